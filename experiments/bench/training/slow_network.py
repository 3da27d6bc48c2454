"""Measures what a slow network costs `scmoe train`, and how much of that a shortcut hides: whole
trainings, on links with a rate.

Every architecture trains one configuration with the same data, seed and steps: with Lightning,
logging, validation and checkpoints, on the links and on links without a rate. All trainings are
alive at once, each in its own processes and network, and one runs at a time: a turn is a few steps,
and a round has a turn of each, so ratios within a round compare what ran within a minute. The
links' rate is searched before each round. The first half of each training is warm-up and is not
timed; in it the schedule is chosen, but for rows with two batches in flight, which run at the
default slot in one chunk. Validation and checkpoints are not timed either.

    compute             a step on links without a rate
    exposed rows        what the MoE windows of a step, forward and backward, take longer than
                        without a rate; not measured with two batches in flight, and in turns
                        without a logged step
    exposed gradients   what else a step takes longer than without a rate: sums that backward does
                        not hide
    peak                memory of a step of rank 0 beyond what is allocated before it: activations
                        and temporary tensors. Measured in one step that is not timed

With a load (scmoe/loads.py) routers deal tokens by it in place of their own choices, and
each architecture also trains on the links with balanced routing. Losses mean nothing then.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from experiments.bench.other_settings import TrainingSetting
from experiments.bench.rank_bench import Bench
from experiments.bench.rate_search import find_rate
from experiments.bench.row import BESIDE_ITS_ROW, rows_as, to_json
from experiments.bench.setting import Setting, pair_setting
from experiments.bench.speed_chart import OVER_TOP2, line_colors
from experiments.bench.training.taking_turns import Training
from experiments.bench.two_batches import over_best_top2
from experiments.engine.ranks import run_ranks
from scmoe.charts import chart, heading
from scmoe.config.derived import max_steps, samples_of_rank, word_for_steps
from scmoe.config.fields import Config
from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.config.registry import FAMILIES
from scmoe.loads import BALANCED, Sizes, check_load, imbalance, load_of, loads_suffix
from scmoe.planning.clock import in_turn, median, quartiles
from scmoe.planning.planner import MOST_TRIES, most_steps
from scmoe.predict.costs import estimate
from scmoe.predict.row_names import batches_of, name_of, way_of_row
from scmoe.report import Report, publish, say
from scmoe.training.assembly.trainer import adaptive_schedule
from scmoe.training.run.directory import slug_of

CHOSEN = ("schedule.auto=true", "schedule.batches_in_flight=1")  # slot and chunks
TRAINED_ROWS = {  # the first is sequential: nothing can be hidden in it
    "top2": ("moe.architecture=top_k", "moe.top_k=2"),
    "shared_expert": ("moe.architecture=shared_expert", *CHOSEN),
    "scmoe_pos2": ("moe.position=pos2", *CHOSEN),
    "scmoe_pos3": ("moe.position=pos3", *CHOSEN),
}
ROWS_OF_TWO_BATCHES = {  # by request
    f"{row}_two": (*TRAINED_ROWS[row][: 2 if row == "top2" else 1], "schedule.batches_in_flight=2")
    for row in TRAINED_ROWS
}
LINKS, WITHOUT_RATE = "links", "links without a rate"
NETWORKS = (LINKS, WITHOUT_RATE)
BALANCED_LINKS = "balanced, links"  # with a load, the same on the links with balanced routing


def row_overrides(row: str) -> tuple[str, ...]:
    """Return what a configuration says of a row."""
    return (TRAINED_ROWS | ROWS_OF_TWO_BATCHES)[row]


@dataclass(frozen=True)
class UnevenTraining:
    """What a load costs a training. over_balanced: its step over that with balanced routing.
    dropped: share of the copies. The others say how uneven the routing is (loads.imbalance)."""

    over_balanced: float
    dropped: float
    max_over_mean_ranks: float
    max_over_mean_experts: float
    max_over_mean_tokens: float


@dataclass(frozen=True)
class TrainedRow:
    """A training: medians over its turns on the links.

    speedup: over the first row. compute_s: a step on links without a rate. exposed_s: what a step
    on the links takes longer; its parts are not known with two batches in flight. val_losses:
    seconds of training, and the loss. at_load: None where the routers choose.
    """

    tokens_per_s: float
    speedup: float
    quartiles: list[float]
    step_s: float
    compute_s: float
    rows_over_gradients: float
    val_loss: float
    val_losses: list[list[float]]
    exposed_s: float | None = None
    exposed_rows_s: float | None = None
    exposed_gradients_s: float | None = None
    peak_mb: float | None = None
    at_load: UnevenTraining | None = field(default=None, metadata=BESIDE_ITS_ROW)


def bench_train(setting: TrainingSetting, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into `out`. Return the report.

    overrides: of the configuration. The caller has entered a network namespace
    (experiments/engine/links.py). ConfigError: the load cannot be dealt.
    """
    require("bench train", "matplotlib")
    ranks = setting.ranks
    words = [*overrides, f"trainer.devices={ranks}", f"strategy.ep_size={ranks}"]
    configs = {
        row: load_config(setting.config, [*words, *row_overrides(row)]) for row in setting.rows
    }
    first = configs[setting.rows[0]]
    refuse_unequal(first)
    pair = pair_setting(first, setting.share, ranks, samples_of_rank(first) * first.data.seq_len)
    imbalances = {}
    if setting.load is not None:
        imbalances = {
            row: imbalance_of_config(setting.load, each, pair) for row, each in configs.items()
        }
    ends = ends_of_turns(max_steps(first), setting.rounds)
    for config in configs.values():
        refuse_trials(config, ends[0])
    measured = measure(setting, words, pair, ends)
    rows = {}
    for row, config in configs.items():
        rows[row] = trained_row(config, measured, row, setting.rows[0])
        if setting.load is not None:
            rows[row] = replace(rows[row], at_load=measured.uneven_training(row, imbalances[row]))
    report: dict[str, Any] = {
        "setting": asdict(setting),
        "config": setting.config,
        "overrides": list(overrides),
        "wanted_share": setting.share,
        "link_mbit": measured.rate,
        "ranks": ranks,
        "rounds": setting.rounds,
        "steps": ends[-1],
        "rows": to_json(rows),
    }
    if setting.load is not None:
        report["load"] = {"name": setting.load, **imbalances[setting.rows[0]]}
    publish(report, tables(report), draw, out / name_of_report(setting, overrides))
    return report


def name_of_report(setting: TrainingSetting, overrides: Sequence[str]) -> str:
    """Return the name of the report's files, without a suffix: unusual ranks, configs and overrides
    are in it, rows (but two batches) and rounds are not."""
    usual = TrainingSetting()
    words = ["train"]
    if any(batches_of(row) == 2 for row in setting.rows):
        words.append("two-batches")
    words.append(f"share-{setting.share:g}")
    if setting.ranks != usual.ranks:
        words.append(f"{setting.ranks}-ranks")
    config = [] if setting.config == usual.config else [f"config={setting.config}"]
    slug = slug_of([*config, *overrides])
    if slug:
        words.append(slug)
    loads = [] if setting.load is None else [setting.load]
    return "-".join(words) + loads_suffix(loads)


def refuse_unequal(config: Config) -> None:
    """Raise ConfigError for a configuration whose trainings cannot be compared."""
    if (family := config.model.family) in FAMILIES.images:
        of_texts = (name for name in FAMILIES.names() if name not in FAMILIES.images)
        raise ConfigError(
            f"model.family is {family}, allowed: {' | '.join(of_texts)}, as speeds are in tokens"
        )
    if config.trainer.limit_val_batches == 0:
        raise ConfigError(
            "trainer.limit_val_batches is 0, allowed: 1 or more, as losses are compared"
        )
    if (early := config.trainer.early_stopping) is not None:
        raise ConfigError(
            f"trainer.early_stopping is {early}, allowed: null, as all trainings take all steps"
        )


def ends_of_turns(steps: int, rounds: int) -> range:
    """Return the numbers of steps after which the turns end: the first half of a training is its
    first turn."""
    turn = steps // 2 // rounds
    if turn == 0:
        raise ConfigError(
            f"--rounds is {rounds}, allowed: 2 to {steps // 2}, half of trainer.max_steps"
        )
    return range(steps - rounds * turn, steps + 1, turn)


def refuse_trials(config: Config, untimed: int) -> None:
    """Raise ConfigError if timed steps may be trials of the planner. untimed: steps before them."""
    if not config.schedule.auto:
        return
    batches = config.trainer.accumulate  # a step of the planner is one of them
    chunks = adaptive_schedule(config, None, (1,)).chunks
    needed = math.ceil(most_steps(len(chunks), MOST_TRIES * batches) / batches)
    if untimed < needed:
        raise ConfigError(
            f"schedule.auto may need {needed} steps to choose, and {untimed} come before the timed"
            f" ones. Give {word_for_steps(config, 2 * needed)} or more"
        )


class MeasuredTrainings(NamedTuple):
    """What all turns have measured. rate: of the links, the median over rounds. times: step and
    windows of each round in seconds, by row and network. results: what each training returned."""

    rate: float
    times: dict[tuple[str, str], Any]
    results: dict[tuple[str, str], dict[str, Any]]

    def uneven_training(self, row: str, imbalances: Mapping[str, float]) -> UnevenTraining:
        """Return what the load costs a row. imbalances: how uneven it makes the row's routing."""
        over = self.times[row, LINKS][0] / self.times[row, BALANCED_LINKS][0]
        return UnevenTraining(median(over), self.results[row, LINKS]["dropped"], **imbalances)


def measure(
    setting: TrainingSetting, words: Sequence[str], pair: Setting, ends: range
) -> MeasuredTrainings:
    """Train all rows on all networks in turn. words: of the configuration. pair: on it the links'
    rate is searched before each round."""
    networks = NETWORKS if setting.load is None else (*NETWORKS, BALANCED_LINKS)
    rates: list[float] = []  # of each round, as the machine's speed drifts

    def one(row: str, network: str) -> list[float]:
        if (row, network) == (setting.rows[0], LINKS):  # a round begins
            start = rates[-1:]
            of_ranks = run_ranks(
                searched, setting.ranks, pair, *start, timeout_s=1800, own_links=True
            )
            rates.extend(of_ranks[:1])
        return trainings[row, network].turn(None if network == WITHOUT_RATE else rates[-1])

    with ThreadPoolExecutor(len(setting.rows) * len(networks)) as pool:
        trainings: dict[tuple[str, str], Training] = {
            (row, network): Training(
                pool,
                setting.ranks,
                setting.config,
                [*words, *row_overrides(row)],
                BALANCED if network == BALANCED_LINKS else setting.load,
                ends,
            )
            for row in setting.rows
            for network in networks
        }
        try:
            variants = {key: partial(one, *key) for key in trainings}
            times = in_turn(variants, setting.rounds, say=say)
            results = {name: training.finish() for name, training in trainings.items()}
        finally:
            for training in trainings.values():
                training.stop()
    return MeasuredTrainings(median(rates[1:]), times, results)


def tables(report: dict[str, Any]) -> list[Report]:
    title = (
        "{config}, {steps} steps, {ranks} ranks, links of {link_mbit:.0f} Mbit/s; medians of"
        " {rounds} rounds:"
    )
    columns = {
        "tokens/s": "{tokens_per_s:.0f}",
        "over the first": "{speedup:.2f}",
        "[quartiles]": "[{quartiles[0]:.2f} {quartiles[1]:.2f}]",
        "step, s": "{step_s:.3f}",
        "compute, s": "{compute_s:.3f}",
        "exposed rows, s": "{exposed_rows_s:.3f}",
        "exposed gradients, s": "{exposed_gradients_s:.3f}",
        "rows/gradients": "{rows_over_gradients:.2f}",
        "validation loss": "{val_loss:.3f}",
    }
    rows = rows_as(TrainedRow, report)
    if any(row.exposed_rows_s is None for row in rows.values()):
        columns["exposed, s"] = "{exposed_s:.3f}"
    if any(row.peak_mb is not None for row in rows.values()):
        columns["peak, MiB"] = "{peak_mb:.1f}"
    if "load" in report:
        title = f"{report['load']['name']}, {title}"
        columns["busiest rank"] = "{max_over_mean_ranks:.2f}"
        columns |= {"over balanced": "{over_balanced:.2f}", "dropped": "{dropped:.1%}"}
        del columns["validation loss"]
    cells = to_json(rows)
    if "top2" in cells:
        columns[OVER_TOP2] = "{over_top2:.2f}"
        gains = over_best_top2({name: row.speedup for name, row in rows.items()})
        for name, row in cells.items():
            row["over_top2"] = gains[name]
    return [Report(title.format_map(report), cells, columns)]


def imbalance_of_config(routing: str, config: Config, pair: Setting) -> dict[str, float]:
    """Return how uneven a load makes a configuration's routing. Raises ConfigError where it cannot
    be dealt."""
    if load_of(routing).kind == "ragged":
        raise ConfigError(
            f"--load is {routing}, but all ranks of a training have equally many tokens. Give"
            " another kind of load."
        )
    sizes = Sizes(config.moe.num_experts, config.moe.top_k, pair.ranks)
    check_load(load_of(routing), sizes, pair.sequences)
    return imbalance(load_of(routing), sizes, pair.sequences, pair.seq_len)


def trained_row(config: Config, measured: MeasuredTrainings, row: str, first: str) -> TrainedRow:
    """Return the figures of a row. first: the row that it is compared with."""
    times, trained = measured.times, measured.results[row, LINKS]
    curve: list[tuple[float, float]] = trained["curve"]  # tokens, validation loss
    step, windows = times[row, LINKS]
    step_without, windows_without = times[row, WITHOUT_RATE]
    rows, speedups = windows - windows_without, times[first, LINKS][0] / step
    tokens = config.data.global_batch_size * config.data.seq_len
    step_s = median(step)
    figures = TrainedRow(
        tokens_per_s=tokens / step_s,
        speedup=median(speedups),
        quartiles=quartiles(speedups),
        step_s=step_s,
        compute_s=median(step_without),
        exposed_s=median(step - step_without),
        rows_over_gradients=estimate(config)["rows_over_gradients"],
        peak_mb=trained["peak_mb"],
        val_loss=curve[-1][1],
        val_losses=[[seen / tokens * step_s, loss] for seen, loss in curve],
    )
    is_known = ~np.isnan(rows)  # with two batches in flight windows overlap each other
    if not is_known.any():
        return figures
    gradients = step - step_without - rows
    return replace(
        figures,
        exposed_rows_s=median(rows[is_known]),
        exposed_gradients_s=median(gradients[is_known]),
    )


def searched(rank: int, world_size: int, pair: Setting, start: float | None = None) -> float:
    """Run on every rank. Return the links' rate in Mbit/s. start: the search begins there."""
    dist.init_process_group("gloo")
    bench = Bench(pair)
    return find_rate(pair, bench.set_rate, bench.infer, start)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the validation loss of each row against the seconds that its training took."""
    words = ""
    if "load" in report:
        words = f", {report['load']['name']}: routers do not choose, so losses mean nothing"
    with chart(path, 3.4 + 0.2 * len(report["rows"])) as figure:
        axis = figure.subplots()
        colors = line_colors(report["rows"])
        for row, figures in rows_as(TrainedRow, report).items():
            seconds, losses = np.asarray(figures.val_losses).T
            axis.plot(
                seconds,
                losses,
                marker="o",
                linestyle="--" if batches_of(row) == 2 else "-",
                color=colors[row],
                label=f"{name_of(row)}{way_of_row(row)}: {figures.tokens_per_s:.0f} tokens/s",
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
            f" Mbit/s{words}",
        )
