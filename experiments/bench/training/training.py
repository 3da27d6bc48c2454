"""What a slow network costs `scmoe train`, and what a shortcut hides of it: the product itself, on
links with a rate.

Every architecture trains one configuration with the same data, seed and steps: with Lightning,
logging, validation and checkpoints, on the links and on links without a rate. All trainings are
alive at once, each in its own processes and network, and one runs at a time: a turn is a few steps,
and a round has a turn of each, so ratios within a round compare what ran within a minute. The
links' rate is searched before each round. The first half of each training is warm-up and is not
timed; in it the schedule is chosen, but for rows with two batches in flight, which run at the
default slot in one chunk. Validation and checkpoints are not timed either.

    compute             a step on links without a rate
    exposed rows        what the MoE windows of a step, forward and backward, take longer than
                        without a rate; not measured with two batches in flight
    exposed gradients   what else a step takes longer than without a rate: sums that backward does
                        not hide
    peak                memory of a step of rank 0 beyond what is allocated before it: activations
                        and temporary tensors. Measured in one step that is not timed

With a load (scmoe/loads.py) routers deal tokens by it in place of their own choices, and
each architecture also trains on the links with balanced routing. Losses mean nothing then.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from experiments.bench.pairs import Setting, pair_of
from experiments.bench.rank_bench import Bench
from experiments.bench.rate_search import find_rate
from experiments.bench.speed_chart import OVER_TOP2, line_colors
from experiments.bench.training.training_turns import Training
from experiments.bench.two_batches import over_best_top2
from experiments.engine.ranks import run_ranks
from scmoe.charts import chart, heading
from scmoe.config.derived import max_steps, samples_of_rank
from scmoe.config.extras import require
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load
from scmoe.loads import BALANCED, Sizes, check_load, imbalance, kinds_of, load_of
from scmoe.planning.clock import in_turn, median, quartiles
from scmoe.predict.costs import estimate
from scmoe.predict.row_names import batches_of, name_of, way_of_row
from scmoe.report import Report, publish

CHOSEN = ("schedule.auto=true", "schedule.batches_in_flight=1")  # slot and chunks
ARCHITECTURES = {  # the first is sequential: nothing can be hidden in it
    "top2": ("moe.architecture=top_k", "moe.top_k=2"),
    "shared_expert": ("moe.architecture=shared_expert", *CHOSEN),
    "scmoe_pos2": ("moe.position=pos2", *CHOSEN),
    "scmoe_pos3": ("moe.position=pos3", *CHOSEN),
}
ROWS_OF_TWO_BATCHES = {  # by request
    f"{row}_two": (*ARCHITECTURES[row][: 2 if row == "top2" else 1], "schedule.batches_in_flight=2")
    for row in ARCHITECTURES
}
NETWORKS = ("links", "free")
EVEN = "balanced, links"  # with a load, the same on the links with balanced routing


def words_of(row: str) -> tuple[str, ...]:
    """Return what a configuration says of a row."""
    return (ARCHITECTURES | ROWS_OF_TWO_BATCHES)[row]


def bench_train(
    config: str,
    overrides: Sequence[str],
    share: float,
    ranks: int,
    rounds: int,
    rows: Sequence[str],
    routing: str | None,
    out: Path,
) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into `out`. Return the report.

    share: of communication, of a sequential top-2 pair of the configuration's sizes. routing: a
    load of the experts; None: routers choose. The caller has entered a network namespace
    (experiments/engine/links.py). ConfigError: the load cannot be dealt.
    """
    require("bench train", "matplotlib")
    words = [*overrides, f"trainer.devices={ranks}", f"strategy.ep_size={ranks}"]
    configs = {row: load(config, [*words, *words_of(row)]) for row in rows}
    first = configs[rows[0]]
    if first.trainer.limit_val_batches == 0:
        raise ConfigError(
            "trainer.limit_val_batches is 0, allowed: 1 or more, as losses are compared"
        )
    if (early := first.trainer.early_stopping) is not None:
        raise ConfigError(
            f"trainer.early_stopping is {early}, allowed: null, as all trainings take all steps"
        )
    pair = pair_of(first, share, ranks, samples_of_rank(first) * first.data.seq_len)
    uneven = (
        {}
        if routing is None
        else {row: made_by(routing, each, pair, ranks) for row, each in configs.items()}
    )
    steps = max_steps(first)
    turn = steps // 2 // rounds
    if turn == 0:
        raise ConfigError(
            f"--rounds is {rounds}, allowed: 2 to {steps // 2}, half of trainer.max_steps"
        )
    ends = range(steps - rounds * turn, steps + 1, turn)
    networks = NETWORKS if routing is None else (*NETWORKS, EVEN)
    rates: list[float] = []  # of each round, as the machine's speed drifts

    def one(row: str, network: str) -> list[float]:
        if (row, network) == (rows[0], NETWORKS[0]):  # a round begins
            rates.extend(
                run_ranks(searched, ranks, pair, *rates[-1:], timeout_s=1800, own_links=True)[:1]
            )
        return trainings[row, network].turn(None if network == "free" else rates[-1])

    with ThreadPoolExecutor(len(rows) * len(networks)) as pool:
        trainings = {
            (row, network): Training(
                pool,
                ranks,
                config,
                [*words, *words_of(row)],
                BALANCED if network == EVEN else routing,
                ends,
            )
            for row in rows
            for network in networks
        }
        try:
            variants = {key: partial(one, *key) for key in trainings}
            times = in_turn(variants, rounds, say=partial(print, file=sys.stderr))
            results = {name: training.finish() for name, training in trainings.items()}
        finally:
            for training in trainings.values():
                training.stop()
    report: dict[str, Any] = {
        "config": config,
        "overrides": list(overrides),
        "wanted_share": share,
        "link_mbit": median(rates[1:]),
        "ranks": ranks,
        "rounds": rounds,
        "steps": steps,
        "rows": {
            row: row_of(configs[row], times, row, rows[0], results[row, "links"]) for row in rows
        },
    }
    if routing is not None:
        report["load"] = {"name": routing, **uneven[rows[0]]}
        for row, figures in report["rows"].items():
            over = median(times[row, "links"][0] / times[row, EVEN][0])
            figures |= {
                "over_balanced": over,
                "dropped": results[row, "links"]["dropped"],
                **uneven[row],
            }
    two = "two-batches-" if any(batches_of(row) == 2 for row in rows) else ""
    name = f"train-{two}share-{share:g}{kinds_of([] if routing is None else [routing])}"
    publish(report, tables(report), draw, out / name)
    return report


def tables(report: dict[str, Any]) -> list[Report]:
    title = (
        "{config}, {steps} steps, {ranks} ranks, links of {link_mbit:.0f} Mbit/s; medians of"
        " {rounds} rounds:"
    )
    columns = {
        "tokens/s": "{tokens_per_s:.0f}",
        "over the first": "{speedup:.2f}",
        "[quartiles]": "[{quartiles[0]:.2f} {quartiles[1]:.2f}]",
        "step": "{step_s:.3f} s",
        "compute": "{compute_s:.3f} s",
        "exposed rows": "{exposed_rows_s:.3f} s",
        "exposed gradients": "{exposed_gradients_s:.3f} s",
        "rows/gradients": "{rows_over_gradients:.2f}",
        "validation loss": "{val_loss:.3f}",
    }
    rows = report["rows"].values()
    if any("exposed_rows_s" not in row for row in rows):
        columns["exposed"] = "{exposed_s:.3f} s"
    if any("peak_mb" in row for row in rows):
        columns["peak, MiB"] = "{peak_mb:.1f}"
    if "load" in report:
        title = f"{report['load']['name']}, {title}"
        columns["busiest rank"] = "{max_over_mean_ranks:.2f}"
        columns |= {"over balanced": "{over_balanced:.2f}", "dropped": "{dropped:.1%}"}
        del columns["validation loss"]
    cells = {name: dict(row) for name, row in report["rows"].items()}
    if "top2" in cells:
        columns[OVER_TOP2] = "{over_top2:.2f}"
        gains = over_best_top2({name: row["speedup"] for name, row in cells.items()})
        for name, row in cells.items():
            row["over_top2"] = gains[name]
    return [Report(title.format_map(report), cells, columns)]


def made_by(routing: str, config: Config, pair: Setting, ranks: int) -> dict[str, float]:
    """Return how uneven a load makes a configuration's routing. Raises ConfigError where it cannot
    be dealt."""
    if load_of(routing).kind == "ragged":
        raise ConfigError(
            f"--load is {routing}, but all ranks of a training have equally many tokens. Give"
            " another kind of load."
        )
    sizes = Sizes(config.moe.num_experts, config.moe.top_k, ranks)
    check_load(load_of(routing), sizes, pair.sequences)
    return imbalance(load_of(routing), sizes, pair.sequences, pair.seq_len)


def row_of(
    config: Config, times: dict[tuple[str, str], Any], row: str, first: str, trained: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures of a row. trained: what its training on the links has returned."""
    curve: list[tuple[float, float]] = trained["curve"]  # tokens, validation loss
    (step, windows), (free, free_windows) = (times[row, network] for network in NETWORKS)
    rows, speedups = windows - free_windows, times[first, "links"][0] / step
    tokens = config.data.global_batch_size * config.data.seq_len
    step_s = median(step)
    exposed = {"exposed_s": median(step - free)}
    if not np.isnan(rows).any():  # with two batches in flight windows overlap each other
        exposed["exposed_rows_s"] = median(rows)
        exposed["exposed_gradients_s"] = median(step - free - rows)
    return {
        "tokens_per_s": tokens / step_s,
        "speedup": median(speedups),
        "quartiles": quartiles(speedups),
        "step_s": step_s,
        "compute_s": median(free),
        **exposed,
        "rows_over_gradients": estimate(config)["rows_over_gradients"],
        "peak_mb": trained["peak_mb"],
        "val_loss": curve[-1][1],
        "val_losses": [
            [seen / tokens * step_s, loss] for seen, loss in curve
        ],  # seconds of training
    }


def searched(rank: int, world_size: int, pair: Setting, start: float | None = None) -> float:
    """Run on every rank. Return the links' rate in Mbit/s. start: the search begins there."""
    dist.init_process_group("gloo")
    bench = Bench(pair)
    return find_rate(pair, bench.set_rate, bench.infer, start)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the validation loss of each row against the seconds that its training took."""
    with chart(path, 3.4 + 0.2 * len(report["rows"])) as figure:
        axis = figure.subplots()
        colors = line_colors(report["rows"])
        for row, figures in report["rows"].items():
            seconds, losses = np.asarray(figures["val_losses"]).T
            axis.plot(
                seconds,
                losses,
                marker="o",
                linestyle="--" if batches_of(row) == 2 else "-",
                color=colors[row],
                label=f"{name_of(row)}{way_of_row(row)}: {figures['tokens_per_s']:.0f} tokens/s",
            )
        axis.set(
            xlabel="seconds of training, without validation and checkpoints",
            ylabel="validation loss",
        )
        axis.grid(axis="y")
        figure.legend(loc="outside lower left")
        heading(
            figure,
            f"{report['config']} on {report['ranks']} ranks, links of {report['link_mbit']:.0f}"
            " Mbit/s",
        )
