"""The report of `bench overlap`: how much of the All-to-All every architecture and schedule hides.

Ratios are to sequential top-2, taken round by round, medians.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import speed_chart
from experiments.bench.overlap import uneven
from experiments.bench.overlap.auto import auto_of_both, over_best_finalist
from experiments.bench.overlap.over_best import over_best
from experiments.bench.overlap.overlap import (
    Measured,
    PlannedRow,
    block_seconds,
    in_halves,
    measure,
)
from experiments.bench.overlap.refusals import refuse_impossible
from experiments.bench.overlap_rows import OverlapRow, rows_of
from experiments.bench.pairs import USUAL_RATIO, Setting, share_sent
from experiments.bench.rank_bench import Seconds
from experiments.bench.rate_search import warn_of_share
from experiments.bench.stacks import Variant, of_each_kind, waiting_of
from experiments.engine import links
from experiments.engine.ranks import run_ranks
from scmoe.config.extras import require
from scmoe.loads import BALANCED, kinds_of
from scmoe.planning.clock import median, quartiles
from scmoe.report import publish
from scmoe.schedule.cost import OperatorTimes, overlap_efficiency

SIZES = (  # of a report's calibration
    "dim",
    "ffn_dim",
    "heads",
    "tokens",
    "seq_len",
    "accumulate",
    "num_experts",
    "attention_ms",
    "attention_to_mlp",
)
PAYLOAD = 1448 / 1514  # of what a link carries; the rest is headers of TCP, IP and Ethernet


def bench_overlap(setting: Setting, out: Path) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Return the
    report.

    ConfigError: an option that cannot be honoured. The program starts again in a network namespace,
    where links can be shaped.
    """
    require("bench overlap", "matplotlib")
    refuse_impossible(setting)
    gpu = setting.device == "cuda"
    missing = None if gpu or links.inside() else links.why_not()
    setting = replace(setting, shaped=not gpu and missing is None, bus=gpu)
    if setting.shaped:
        links.enter()
    elif not gpu:
        print(
            f"links cannot be shaped here ({missing}), so rows travel over the loopback device as"
            " it is; every row of the report says links=loopback",
            file=sys.stderr,
        )
    measured = run_ranks(
        measure, setting.ranks, setting, timeout_s=3 * 3600, own_links=setting.shaped
    )[0]
    report = summary(setting, measured[BALANCED])
    if setting.shaped or setting.bus:
        warn_of_share(report["wanted_share"], report["comm_share"])
    name = name_of_report(setting)
    if setting.loads:
        control = measured[BALANCED], report
        report = {"loads": [summary(setting, measured[load], control) for load in setting.loads]}
    bench = uneven if setting.loads else speed_chart
    publish(report, bench.tables(report), bench.draw, out / name)
    return report


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
    if setting.rows_per_gradient not in (None, USUAL_RATIO):
        words.append(f"ratio-{setting.rows_per_gradient:g}")
    usual_tokens = setting.level == "block" and setting.tokens == Setting.tokens
    if setting.rows_per_gradient is None and not usual_tokens:
        words.append(f"tokens-{setting.tokens}")
    if setting.asked_layers is not None:
        words.append(f"layers-{setting.layers}")
    if setting.accumulate != 1:
        words.append(f"accumulate-{setting.accumulate}")
    if setting.every == 1:
        words.append("every-1")
    if setting.top_k != 1:
        words.append(f"top-{setting.top_k}")
    if setting.layout is not None:
        words.append(setting.layout.replace(":", "-"))
    return "-".join(words) + kinds_of(setting.loads)


def summary(
    setting: Setting, measured: Measured, control: tuple[Measured, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the medians of the rounds, by row.

    measured: what `measure` returned on rank 0. control: the same of the balanced load in the same
    rounds, and its report, if this is another load.
    """
    sequential = block_seconds(measured, "top2", "sequential")
    free = block_seconds(measured, "top2", "free")
    limit_forward = median(sequential.forward / free.forward)
    least = least_times(setting, measured, "top2") if has_limit(setting, measured) else free.train
    report: dict[str, Any] = {
        "wanted_share": setting.share if setting.link_mbit is None else None,
        "comm_share": 1 - 1 / limit_forward,
        "link_mbit": None if setting.bus else measured.rate,
        "ranks": setting.ranks,
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "compute": setting.compute,
        "level": setting.level,
        "layers": setting.layers,
        "every": setting.every,
        "top_k": setting.top_k,
        "rounds": setting.rounds,
        "tries": setting.tries,
        "iterations": measured.iterations,
        "limit_forward": limit_forward,
        "limit_train": median(sequential.train / least),
        "transfer_cpu_ms_forward": median(1e3 * sequential.cpu_forward - 1e3 * free.cpu_forward),
        "transfer_cpu_ms_train": median(1e3 * sequential.cpu_train - 1e3 * free.cpu_train),
    }
    if printed := speed_chart.paper_of(report):
        report |= {"paper": printed.rows, "paper_source": printed.where}
    if setting.bus:
        report["bus_rate"] = measured.rate
    if setting.level == "iteration":
        report |= {
            "gradient_mb": gradient_mb(measured, "top2"),
            "rows_over_gradients": rows_over_gradients(setting, measured, "top2"),
            "wanted_ratio": setting.rows_per_gradient,
            "accumulate": setting.accumulate,
            "tokens": setting.tokens,
            "dim": setting.dim,
        }
    rows = {
        name: replace(row_of(setting, measured, name), **over_best(setting, measured, name))
        for name in setting.rows
    }
    if control is not None:
        balanced_measured, balanced = control
        balanced_rows = rows_of(balanced)
        made = uneven.made_by(setting, measured.load, "top2")
        report["load"] = {"name": measured.load, **made}
        report |= {"layout": "dropless", "balanced_share": balanced["comm_share"]}
        rows = {
            name: uneven.beside_balanced(
                setting, measured, balanced_measured, name, row, balanced_rows[name]
            )
            for name, row in rows.items()
        }
    if setting.layout is not None:
        report["layout"] = setting.layout
    best = {name: measured.times[row.best] for name, row in measured.rows.items()}
    fastest = max(rows, key=lambda name: rows[name].forward_speedup)
    over_fastest = {
        name: median(seconds.forward / best[fastest].forward) for name, seconds in best.items()
    }
    report["fastest_forward"] = {"row": fastest, "over": over_fastest}
    if scmoe := [name for name in rows if name.startswith("scmoe")]:
        quickest = min(scmoe, key=lambda name: rows[name].train_ms)
        forward = {
            name: all_quartiles(seconds.forward / best[quickest].forward)
            for name, seconds in best.items()
        }
        train = {
            name: all_quartiles(seconds.train / best[quickest].train)
            for name, seconds in best.items()
        }
        report["fastest_scmoe"] = {"row": quickest, "over": {"forward": forward, "train": train}}
    if "top2" in rows:
        report["top2_operators_ms"] = operators_ms(measured.rows["top2"].choices[0].times[1])
        even = measured if control is None else control[0]
        report["calibration"] = calibration_of(setting, even)
    return {**report, "rows": {name: row.to_json() for name, row in rows.items()}}


def row_of(setting: Setting, measured: Measured, name: str) -> OverlapRow:
    """Return the figures of one row: its best schedule beside sequential top-2."""
    row, block = measured.rows[name], setting.block_of(name)
    schedule, chosen = row.best.schedule, row.chosen.schedule
    best = measured.times[row.best]
    top2 = block_seconds(measured, "top2", "sequential")
    sequential = block_seconds(measured, block, "sequential")
    free = block_seconds(measured, block, "free")
    forward, train = top2.forward / best.forward, top2.train / best.train
    exposed = setting.accumulate * waiting_of(row.best, row.choices)
    figures = OverlapRow(
        forward_ms=1e3 * median(best.forward),
        train_ms=1e3 * median(best.train),
        forward_speedup=median(forward),
        train_speedup=median(train),
        forward_quartiles=quartiles(forward),
        train_quartiles=quartiles(train),
        overlap_forward=median(overlap_efficiency(best.forward, sequential.forward, free.forward)),
        overlap_backward=median(
            overlap_efficiency(best.backward, sequential.backward, free.backward)
        ),
        slot=schedule.slot,
        inside_attention=schedule.inside_attention,
        chunks=schedule.chunks,
        auto_slot=chosen.slot,
        auto_inside_attention=chosen.inside_attention,
        inside_gain=inside_gain(row, measured.times),
        auto_chunks=chosen.chunks,
        auto_over_best=over_best_finalist(row.chosen, row.finalists, measured.times),
        auto_of_both=auto_of_both(measured, name),
        measured_over_model=median(best.train) / (median(free.train) + exposed),
        batches_in_flight=row.best.batches_in_flight,
        peak_mb=row.peak_mb,
        peak_over_one_batch=(
            None if row.one_batch_peak_mb is None else row.peak_mb / row.one_batch_peak_mb
        ),
        links="bus" if setting.bus else "shaped" if setting.shaped else "loopback",
        compute=setting.compute,
    )
    if setting.every == 1:  # Nous' first block has a shorter window
        figures = replace(figures, auto_slots=[each.schedule.place for each in row.choices])
    if setting.level == "iteration":
        figures = replace(
            figures,
            gradient_mb=gradient_mb(measured, block),
            rows_over_gradients=rows_over_gradients(setting, measured, block),
        )
    if has_limit(setting, measured):
        least = least_times(setting, measured, block)
        figures = replace(
            figures, limit_train=median(top2.train / least), of_limit=median(least / best.train)
        )
    return figures


def inside_gain(row: PlannedRow, times: Mapping[Variant, Seconds]) -> dict[str, Any] | None:
    """Return what experts inside attention gain: the time of the row's best schedule between
    operators over that of its best one inside, as quartiles with the median between them. None: the
    window has no attention.
    """
    kinds = of_each_kind(row.finalists)
    if len(kinds) < 2:
        return None
    between, inside = (min(kind, key=lambda v: median(times[v].train)) for kind in kinds)
    return {
        "forward": all_quartiles(times[between].forward / times[inside].forward),
        "train": all_quartiles(times[between].train / times[inside].train),
        "between": f"{between.schedule.place} x {between.schedule.chunks}",
        "inside": f"{inside.schedule.place} x {inside.schedule.chunks}",
    }


def has_limit(setting: Setting, measured: Measured) -> bool:
    """Return whether an iteration's limit is known.

    An iteration has gradients, so it requires the rate of the links, and even rows.
    """
    return setting.level == "iteration" and setting.shaped and measured.load == BALANCED


def gradient_mb(measured: Measured, block: str) -> float:
    return sum(size for _, size in measured.gradients[block]) / 2**20


def row_bytes(setting: Setting, block: str) -> float:
    """Return the bytes of rows that leave by a link in one direction of one batch: two transfers of
    each MoE."""
    copies = setting.moe_blocks * setting.top_k_of(block) * setting.tokens
    rows = 2 * copies * share_sent(setting.ranks)
    return rows * setting.dim * getattr(torch, setting.dtype).itemsize


def rows_over_gradients(setting: Setting, measured: Measured, block: str) -> float:
    """Return the bytes of rows over the bytes of gradients that a rank sends in one training step,
    the latter by a ring of all ranks."""
    gradients = 2 * (1 - 1 / setting.ranks) * gradient_mb(measured, block) * 2**20
    return 2 * setting.accumulate * row_bytes(setting, block) / gradients


def all_quartiles(values: Any) -> list[float]:
    first, third = quartiles(values)
    return [first, median(values), third]


def in_parallel(computation: float, transfers: Iterable[tuple[float, float]]) -> float:
    """Return the shortest time in which a computation and all transfers can end; the transfers take
    turns on one link.

    transfers: for each, its earliest start, counted from the start of the computation, and its
    duration.
    """
    end, after = computation, 0.0
    for ready, duration in sorted(transfers, reverse=True):
        after += duration  # the link carries all of this after `ready`
        end = max(end, ready + after)
    return end


def least_time(
    forward: float,
    backward: float,
    update: float,
    rows: float,
    gradients: Iterable[tuple[float, float]],
) -> float:
    """Return a lower bound on the time of an iteration whose links also carry gradients: only waits
    that cannot be avoided count. A transfer of rows can start at any time of its direction, and all
    computation of this direction can hide it; a gradient can be sent when it is computed; the
    update needs all of them.

    forward, backward, update: computation alone. rows: time of the transfers of a direction.
    gradients: when in backward each can start, and how long its sum over the ranks takes."""
    return max(forward, rows) + in_parallel(backward, [(0.0, rows), *gradients]) + update


def least_times(setting: Setting, measured: Measured, block: str) -> Any:
    """Return the least time of an iteration in each round, from its times without transfers. A ring
    sends 2 (ranks - 1) / ranks of the gradients' bytes, all of them beside the last batch's
    backward."""
    assert measured.rate is not None
    alone, batches = block_seconds(measured, block, "alone"), setting.accumulate
    bytes_per_s = measured.rate * 1e6 / 8 * PAYLOAD
    rows = row_bytes(setting, block) / bytes_per_s
    sums = [
        (part, 2 * (1 - 1 / setting.ranks) * size / bytes_per_s)
        for part, size in measured.gradients[block]
    ]
    forward, backward = alone.train_forward / batches, (alone.backward - alone.update) / batches
    least = []
    for f, b, update in zip(forward, backward, alone.update, strict=True):
        before = (batches - 1) * least_time(f, b, 0.0, rows, [])
        least.append(before + least_time(f, b, update, rows, [(part * b, s) for part, s in sums]))
    return np.asarray(least)


def calibration_of(setting: Setting, balanced: Measured) -> dict[str, Any]:
    """Return what sequential top-2 says of this machine, for `scmoe simulate testbed`: its
    operators one at a time, all its blocks with free links, and the sizes.

    The times of the blocks are of one batch without sums of gradients. update: the optimizer's.
    free_in_halves_ms: of all blocks with two batches in flight, only if a row with these is
    measured.
    """
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
        "sizes": {name: getattr(setting, name) for name in SIZES},
        "operators_ms": operators_ms(balanced.rows["top2"].choices[0].times[1]),
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
