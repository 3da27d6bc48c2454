"""The report of `bench overlap`: how much of the All-to-All every architecture and schedule hides.

Ratios are to sequential top-2, taken round by round, medians.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from experiments.bench import speed_chart
from experiments.bench.overlap import uneven
from experiments.bench.overlap.limits import (
    gradient_mb,
    has_limit,
    least_times,
    rows_over_gradients,
)
from experiments.bench.overlap.refusals import refuse_impossible
from experiments.bench.overlap.rounds import (
    Measurement,
    best_times,
    block_seconds,
    in_halves,
    measure,
)
from experiments.bench.overlap.row_figures import all_quartiles, measured_row, round_times
from experiments.bench.rate_search import warn_of_share
from experiments.bench.row import KINDS, Row, to_json
from experiments.bench.setting import PAIR_TOKENS, USUAL_RATIO, Setting
from experiments.engine import links
from experiments.engine.ranks import run_ranks
from scmoe.config.installation import require
from scmoe.loads import BALANCED, loads_suffix
from scmoe.planning.clock import median
from scmoe.report import publish, say
from scmoe.schedule.cost import OperatorTimes


def bench_overlap(setting: Setting, out: Path) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Return the
    report.

    ConfigError: an option that cannot be honoured. The program starts again in a network namespace,
    where links can be shaped.
    """
    require("bench overlap", "matplotlib")
    refuse_impossible(setting)
    if setting.links == "shaped" and not links.inside() and (missing := links.why_not()):
        say(
            f"links cannot be shaped here ({missing}), so rows travel over the loopback device as"
            " it is; every row of the report says links=loopback"
        )
        setting = replace(setting, links="loopback")
    shaped = setting.links == "shaped"
    if shaped:
        links.enter()
    measured = run_ranks(measure, setting.ranks, setting, timeout_s=3 * 3600, own_links=shaped)[0]
    report = overlap_report(setting, measured)
    bench = uneven if setting.loads else speed_chart
    publish(report, bench.tables(report), bench.draw, out / name_of_report(setting))
    return report


def overlap_report(setting: Setting, measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """Return the report: the figures at balanced routing, or with loads those of each."""
    balanced = measured[BALANCED]
    if setting.links != "loopback":
        warn_of_share(setting.share, comm_share(balanced))
    if not setting.loads:
        return summary(balanced)
    return {"loads": [summary(measured[load], balanced) for load in setting.loads]}


def name_of_report(setting: Setting) -> str:
    """Return the name of the report's files, without a suffix: what is not usual is in it."""
    words = [
        "uneven" if setting.loads else "overlap",
        setting.compute,
        setting.level,
        "cuda" if setting.device == "cuda" else f"{setting.ranks}-ranks",
    ]
    if setting.link_mbit is None:
        words.append(f"share-{setting.share:g}")
    else:
        words.append(f"{setting.link_mbit:g}-mbit")
    usual = Setting(level=setting.level)
    if setting.rows_per_gradient not in (None, USUAL_RATIO):
        words.append(f"ratio-{setting.rows_per_gradient:g}")
    usual_tokens = setting.level == "block" and setting.tokens == PAIR_TOKENS
    if setting.rows_per_gradient is None and not usual_tokens:
        words.append(f"tokens-{setting.tokens}")
    if setting.layers != usual.layers:
        words.append(f"layers-{setting.layers}")
    if setting.accumulate != 1:
        words.append(f"accumulate-{setting.accumulate}")
    if setting.every == 1:
        words.append("every-1")
    if setting.top_k != 1:
        words.append(f"top-{setting.top_k}")
    sizes = {  # the number, and the usual one
        "dim": (setting.dim, usual.dim),
        "ffn": (setting.ffn_dim, 4 * setting.dim),
        "heads": (setting.heads, usual.heads),
        "experts": (setting.num_experts, usual.num_experts),
    }
    words += [f"{what}-{number}" for what, (number, usually) in sizes.items() if number != usually]
    if setting.layout is not None:
        words.append(setting.layout.replace(":", "-"))
    return "-".join(words) + loads_suffix(setting.loads)


def comm_share(measured: Measurement) -> float:
    """Return the share of communication in a forward pass of sequential top-2."""
    return 1 - 1 / limit_forward(measured)


def limit_forward(measured: Measurement) -> float:
    """Return the speed-up of a forward pass of top-2 without its communication."""
    sequential = block_seconds(measured, "top2", "sequential")
    return median(sequential.forward / block_seconds(measured, "top2", "free").forward)


def summary(measured: Measurement, balanced: Measurement | None = None) -> dict[str, Any]:
    """Return the medians of the rounds, by row.

    measured: what `measure` returned on rank 0. balanced: the same of the balanced load in the same
    rounds, if this is another load.
    """
    setting = measured.setting
    sequential = block_seconds(measured, "top2", "sequential")
    free = block_seconds(measured, "top2", "free")
    least = least_times(measured, "top2") if has_limit(measured) else free.train
    report: dict[str, Any] = {
        "setting": asdict(setting),
        "wanted_share": setting.share,
        "comm_share": comm_share(measured),
        "link_mbit": None if setting.links == "bus" else measured.rate,
        "ranks": setting.ranks,
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "compute": setting.compute,
        "level": setting.level,
        "layers": setting.layers,
        "every": setting.every,
        "top_k": setting.top_k,
        "rounds": setting.rounds,
        "iterations": measured.iterations,
        "limit_forward": limit_forward(measured),
        "limit_train": median(sequential.train / least),
    }
    if setting.device == "cpu":  # while it waits for a GPU the host spins
        spent = 1e3 * sequential.cpu_forward - 1e3 * free.cpu_forward
        report["transfer_cpu_ms_forward"] = median(spent)
    if printed := speed_chart.printed_speedups(report):
        report |= {"paper": printed.rows, "paper_source": printed.where}
    if setting.links == "bus":
        report["bus_rate"] = measured.rate
    if setting.level == "iteration":
        report |= {
            "gradient_mb": gradient_mb(measured, "top2"),
            "rows_over_gradients": rows_over_gradients(measured, "top2"),
            "tokens": setting.tokens,
        }
    rows = {name: measured_row(measured, name) for name in setting.rows}
    if balanced is not None:
        made = uneven.imbalance_of_block(setting, measured.load, "top2")
        report["load"] = {"name": measured.load, **made}
        report |= {"layout": "dropless", "balanced_share": comm_share(balanced)}
        rows = {
            name: uneven.beside_balanced(measured, balanced, name, row)
            for name, row in rows.items()
        }
    if setting.layout is not None:
        report["layout"] = setting.layout
    report |= fastest_scmoe(measured, rows)
    if "top2" in rows:
        report["top2_operators_ms"] = operators_ms(measured.rows["top2"].choice.layers[0].times[1])
        report["calibration"] = calibration_of(balanced or measured)
    return {**report, "rows": to_json(rows)}


def fastest_scmoe(measured: Measurement, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Return the fastest of ScMoE's rows in training: its name, and its speed over that of each
    row. Empty without such a row."""
    scmoe = [name for name in rows if name.startswith("scmoe")]
    if not scmoe:
        return {}
    best = {name: best_times(row.finalists, measured.times) for name, row in measured.rows.items()}
    quickest = min(scmoe, key=lambda name: rows[name].train_ms)
    over: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        times = {name: round_times(seconds, kind) for name, seconds in best.items()}
        over[kind] = {name: all_quartiles(each / times[quickest]) for name, each in times.items()}
    return {"fastest_scmoe": {"row": quickest, "over": over}}


def calibration_of(balanced: Measurement) -> dict[str, Any]:
    """Return what sequential top-2 says of this machine, for `scmoe simulate testbed`: its
    operators one at a time, and all its blocks with free links.

    The times of the blocks are of one batch without sums of gradients. update: the optimizer's.
    free_in_halves_ms: of all blocks with two batches in flight, only if a row with these is
    measured.
    """
    setting = balanced.setting
    transfers = "alone" if setting.level == "iteration" else "free"
    alone = block_seconds(balanced, "top2", transfers, BALANCED)
    batches = setting.accumulate
    halves = {}
    if (measured_halves := balanced.times.get(in_halves(setting.level))) is not None:
        halves["free_in_halves_ms"] = {
            "forward": 1e3 * median(measured_halves.train_forward) / batches,
            "backward": 1e3 * median(measured_halves.backward - measured_halves.update) / batches,
        }
    return {
        "operators_ms": operators_ms(balanced.rows["top2"].choice.layers[0].times[1]),
        "free_forward_ms": 1e3 * median(alone.train_forward) / batches,
        "free_backward_ms": 1e3 * median(alone.backward - alone.update) / batches,
        "update_ms": 1e3 * median(alone.update),
        **halves,
    }


def operators_ms(times: OperatorTimes) -> dict[str, dict[str, float]]:
    """Return the times of a row's operators from the gate on, one at a time, forward and in
    training."""
    forward = {op: 1e3 * seconds for op, seconds in times.forward.items() if seconds}
    return {
        "forward": forward,
        "train": {op: ms + 1e3 * times.backward[op] for op, ms in forward.items()},
    }
