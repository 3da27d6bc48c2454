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

from experiments.bench import speed_chart, uneven
from experiments.bench.exchange import why_no_nodes
from experiments.bench.loads import BALANCED, Place, imbalance, kinds_of, load_of, why_impossible
from experiments.bench.over_best import over_best
from experiments.bench.overlap import Measured, Row, Seconds, measure, warn_of_share, way_of
from experiments.bench.pairs import ROWS, USUAL_RATIO, Setting, through_link
from experiments.bench.stacks import Variant, config_of, of_each_kind, rows_of_layout, waiting_of
from experiments.bench.two_batches import why_no_halves
from experiments.engine import links
from experiments.engine.clock import middle, quartiles
from experiments.engine.ranks import run_ranks
from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.report import publish
from scmoe.schedule.cost import OperatorTimes, overlap_efficiency

PAYLOAD = 1448 / 1514  # of what a link carries; the rest is headers of TCP, IP and Ethernet
OF_EMULATED = ("attention_ms", "attention_to_mlp")


def bench_overlap(setting: Setting, ranks: int, out: Path) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Returns the
    report.

    ConfigError: an option that cannot be honoured. The program starts again in a network namespace,
    where links can be shaped.
    """
    require("bench overlap", "matplotlib")
    if refused := why_refused(setting, ranks):
        raise ConfigError(refused)
    gpu = setting.device == "cuda"
    missing = None if gpu or links.inside() else links.why_not()
    setting = replace(setting, shaped=not gpu and missing is None, bus=gpu)
    if setting.shaped:
        links.enter(setting.nodes)
    elif not gpu:
        print(
            f"links cannot be shaped here ({missing}): loopback as it is, marked in every row",
            file=sys.stderr,
        )
    found = run_ranks(
        measure, ranks, setting, timeout_s=3600, own_links=setting.shaped, nodes=setting.nodes
    )[0]
    report = summary(setting, ranks, found[BALANCED])
    if setting.shaped or setting.bus:
        warn_of_share(report["wanted_share"], report["comm_share"])
    machine = "cuda" if gpu else f"{ranks}-ranks"
    if setting.nodes > 1:
        machine += f"-{setting.nodes}-nodes-{setting.exchange}"
    at = f"share-{setting.share:g}" if setting.link_mbit is None else f"{setting.link_mbit:g}-mbit"
    if setting.rows_per_gradient not in (None, USUAL_RATIO):
        at += f"-ratio-{setting.rows_per_gradient:g}"
    if setting.asked_layers is not None:
        at += f"-layers-{setting.layers}"
    if setting.accumulate != 1:
        at += f"-accumulate-{setting.accumulate}"
    if setting.every == 1:
        at += "-every-1"
    if setting.top_k != 1:
        at += f"-top-{setting.top_k}"
    if setting.layout is not None:
        at += f"-{setting.layout.replace(':', '-')}"
    at += kinds_of(setting.loads)
    name = f"{'uneven' if setting.loads else 'overlap'}-{setting.compute}-{setting.level}-{machine}-{at}"
    if setting.loads:
        control = found[BALANCED], report
        report = {
            "loads": [summary(setting, ranks, found[load], control) for load in setting.loads]
        }
    bench = uneven if setting.loads else speed_chart
    publish(report, bench.tables(report), bench.draw, out / name)
    return report


def why_refused(setting: Setting, ranks: int) -> str | None:
    """Return why the first option that cannot be honoured is refused; None: all can. ConfigError:
    no blocks have these sizes."""
    if setting.device == "cuda":
        if setting.link_mbit is not None:
            return "--link-mbit belongs to links, and one GPU has none: its rows go over its bus"
        if ranks != 1:
            return f"--ranks is {ranks}, allowed with --device cuda: 1"
        if setting.compute != "real":
            return (
                "--compute is emulated, allowed with --device cuda: real (a host that sleeps keeps"
                " no GPU busy)"
            )
        if not torch.cuda.is_available():
            return "--device is cuda, and there is no CUDA device here"
        if setting.loads or setting.layout:
            return (
                "--load and --layout belong to links: rows over the bus of one GPU have equal"
                " numbers"
            )
    elif ranks < 2:
        return f"--ranks is {ranks}, allowed: 2 or more, as one rank sends nothing"
    if setting.nodes != 1 and (refused := why_no_nodes(setting.nodes, ranks)):
        return refused
    if setting.nodes == 1 and setting.exchange != "flat":
        return f"--exchange is {setting.exchange}, allowed with --nodes 1: flat"
    for name in OF_EMULATED:
        if setting.compute != "emulated" and getattr(setting, name) != getattr(Setting, name):
            return (
                f"--{name.replace('_', '-')} belongs to emulated compute, and --compute is"
                f" {setting.compute}"
            )
    if not 0 < setting.share < 1:
        return f"--share is {setting.share:g}, allowed: above 0 and below 1"
    if unknown := [row for row in setting.rows if row not in ROWS[setting.every]]:
        return (
            f"--rows has {unknown[0]}, allowed with --every {setting.every}:"
            f" {' | '.join(ROWS[setting.every])}"
        )
    if setting.layers % setting.every:
        return f"--layers is {setting.layers}, allowed: multiples of --every ({setting.every})"
    if refused := why_no_halves(setting.rows, setting.sequences):
        return refused
    config_of("top2", setting)
    return why_uneven(setting, ranks) or why_no_load(setting, ranks)


def why_no_load(setting: Setting, ranks: int) -> str | None:
    """Return why a load cannot be dealt; None: all can. Raises ConfigError for one that is none, as
    for a layout."""
    rows_of_layout(setting)
    for load in map(load_of, setting.loads):
        for block in dict.fromkeys(["top2", *map(setting.block_of, setting.rows)]):
            place = Place(setting.num_experts, setting.top_k_of(block), ranks)
            if refused := why_impossible(load, place, setting.sequences):
                return refused
        if load.kind == "ragged" and setting.layout not in (None, "dropless"):
            return f"--layout is {setting.layout}, allowed with --load {load.name}: dropless"
    return None


def why_uneven(setting: Setting, ranks: int) -> str | None:
    """Return why tokens cannot be cut into sequences, or experts be shared by ranks; None: both
    can."""
    if setting.tokens % setting.seq_len:
        return f"--tokens is {setting.tokens}, allowed: multiples of --seq-len ({setting.seq_len})"
    if setting.num_experts % ranks:
        return f"--num-experts is {setting.num_experts}, allowed: multiples of --ranks ({ranks})"
    return None


def summary(
    setting: Setting,
    ranks: int,
    found: Measured,
    control: tuple[Measured, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the medians of the rounds, by row. found: what `measure` returned on rank 0. control:
    the same of the balanced load in the same rounds, and its report, if this is another load."""
    sequential, free = way_of(found, "top2", "sequential"), way_of(found, "top2", "free")
    limit_forward = middle(sequential.forward / free.forward)
    least = least_times(setting, ranks, found, "top2") if has_limit(setting, found) else free.train
    report: dict[str, Any] = {
        "wanted_share": setting.share if setting.link_mbit is None else None,
        "comm_share": 1 - 1 / limit_forward,
        "link_mbit": None if setting.bus else found.rate,
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "compute": setting.compute,
        "level": setting.level,
        "layers": setting.layers,
        "every": setting.every,
        "top_k": setting.top_k,
        "rounds": setting.rounds,
        "iterations": found.iterations,
        "limit_forward": limit_forward,
        "limit_train": middle(sequential.train / least),
        "transfer_cpu_ms_forward": middle(1e3 * sequential.cpu_forward - 1e3 * free.cpu_forward),
        "transfer_cpu_ms_train": middle(1e3 * sequential.cpu_train - 1e3 * free.cpu_train),
    }
    if setting.bus:
        report["bus_rate"] = found.rate
    if setting.nodes > 1:
        report |= {"nodes": setting.nodes, "exchange": setting.exchange}
    if setting.level == "iteration":
        report |= {
            "gradient_mb": gradient_mb(found, "top2"),
            "reductions": setting.reductions,
            "rows_over_gradients": rows_over_gradients(setting, ranks, found, "top2"),
            "wanted_ratio": setting.rows_per_gradient,
            "accumulate": setting.accumulate,
            "tokens": setting.tokens,
            "dim": setting.dim,
        }
    rows = {name: row_of(setting, ranks, found, name) for name in setting.rows}
    for name, row in rows.items():
        row |= over_best(setting, found, name)
    if control is not None:
        even, balanced = control
        report["load"] = {"name": found.load} | made_by(setting, ranks, found.load, "top2")
        report |= {"layout": "dropless", "balanced_share": balanced["comm_share"]}
        for name, row in rows.items():
            row |= uneven.beside_balanced(setting, ranks, found, even, name, balanced["rows"][name])
            row |= made_by(setting, ranks, found.load, setting.block_of(name))
    if setting.layout is not None:
        report["layout"] = setting.layout
    best = {name: found.times[row.best] for name, row in found.rows.items()}
    fastest = max(rows, key=lambda name: rows[name]["forward_speedup"])
    over_fastest = {name: middle(own.forward / best[fastest].forward) for name, own in best.items()}
    report["fastest_forward"] = {"row": fastest, "over": over_fastest}
    if scmoe := [name for name in rows if name.startswith("scmoe")]:
        quickest = min(scmoe, key=lambda name: rows[name]["train_ms"])
        forward = {
            name: all_quartiles(own.forward / best[quickest].forward) for name, own in best.items()
        }
        train = {
            name: all_quartiles(own.train / best[quickest].train) for name, own in best.items()
        }
        report["fastest_scmoe"] = {"row": quickest, "over": {"forward": forward, "train": train}}
    if "top2" in rows:
        report["top2_operators_ms"] = operators_ms(found.rows["top2"].choices[0].times[1])
    return {**report, "rows": rows}


def made_by(setting: Setting, ranks: int, load: str, block: str) -> dict[str, float]:
    """Return how uneven a load makes the routing of a block."""
    place = Place(setting.num_experts, setting.top_k_of(block), ranks)
    return imbalance(load_of(load), place, setting.sequences, setting.seq_len)


def row_of(setting: Setting, ranks: int, found: Measured, name: str) -> dict[str, Any]:
    """Return the figures of one row: its best schedule beside sequential top-2."""
    row, block = found.rows[name], setting.block_of(name)
    schedule, chosen = row.best.schedule, row.chosen.schedule
    own, top2 = found.times[row.best], way_of(found, "top2", "sequential")
    sequential, free = way_of(found, block, "sequential"), way_of(found, block, "free")
    forward, train = top2.forward / own.forward, top2.train / own.train
    exposed = setting.accumulate * waiting_of(row.best, row.choices)
    figures = {
        "forward_ms": 1e3 * middle(own.forward),
        "train_ms": 1e3 * middle(own.train),
        "forward_speedup": middle(forward),
        "train_speedup": middle(train),
        "forward_quartiles": quartiles(forward),
        "train_quartiles": quartiles(train),
        "overlap_forward": middle(
            overlap_efficiency(own.forward, sequential.forward, free.forward)
        ),
        "overlap_backward": middle(
            overlap_efficiency(own.backward, sequential.backward, free.backward)
        ),
        "slot": schedule.slot,
        "inside_attention": schedule.inside_attention,
        "chunks": schedule.chunks,
        "auto_slot": chosen.slot,
        "auto_inside_attention": chosen.inside_attention,
        "inside_gain": inside_gain(row, found.times),
        "auto_chunks": chosen.chunks,
        "auto_over_best": auto_over_best(row, found.times),
        "measured_over_model": middle(own.train) / (middle(free.train) + exposed),
        "batches_in_flight": row.best.batches_in_flight,
        "peak_mb": row.peak_mb,
        "links": "bus" if setting.bus else "shaped" if setting.shaped else "loopback",
        "compute": setting.compute,
    }
    if setting.every == 1:  # Nous' first block has a shorter window
        figures["auto_slots"] = [choice.schedule.place for choice in row.choices]
    if setting.level == "iteration":
        figures["gradient_mb"] = gradient_mb(found, block)
        figures["rows_over_gradients"] = rows_over_gradients(setting, ranks, found, block)
    if has_limit(setting, found):
        least = least_times(setting, ranks, found, block)
        figures |= {
            "limit_train": middle(top2.train / least),
            "of_limit": middle(least / own.train),
        }
    return figures


def auto_over_best(row: Row, times: Mapping[Variant, Seconds]) -> float:
    """Return the training time of the planner's choice over that of the best schedule.

    Half of the rounds choose the best schedule, the other half compare, and the reverse; the result
    is the mean of the two medians. In the rounds that choose it, the best was also lucky. It is
    below 1 where luck has chosen a schedule that is slower than the planner's. With one round it
    has chosen the best too."""
    chosen = times[row.chosen].train
    halves = [slice(start, None, 2) for start in range(min(2, len(chosen)))]
    medians = []
    for choose, compare in zip(halves, reversed(halves), strict=True):
        best = min((times[v].train for v in row.finalists), key=lambda train: middle(train[choose]))
        medians.append(middle(chosen[compare] / best[compare]))
    return sum(medians) / len(medians)


def inside_gain(row: Row, times: Mapping[Variant, Seconds]) -> dict[str, Any] | None:
    """Return what experts inside attention gain: the time of the row's best schedule between
    operators over that of its best one inside, as quartiles with the median between them. None: the
    window has no attention.
    """
    kinds = of_each_kind(row.finalists)
    if len(kinds) < 2:
        return None
    whole, inside = (min(own, key=lambda v: middle(times[v].train)) for own in kinds)
    return {
        "forward": all_quartiles(times[whole].forward / times[inside].forward),
        "train": all_quartiles(times[whole].train / times[inside].train),
        "between": f"{whole.schedule.place} x {whole.schedule.chunks}",
        "inside": f"{inside.schedule.place} x {inside.schedule.chunks}",
    }


def has_limit(setting: Setting, found: Measured) -> bool:
    """Whether an iteration's limit is known, which has gradients: it requires the rate of the
    links, and even rows."""
    return setting.level == "iteration" and setting.shaped and found.load == BALANCED


def gradient_mb(found: Measured, block: str) -> float:
    return sum(size for _, size in found.gradients[block]) / 2**20


def row_bytes(setting: Setting, ranks: int, block: str) -> float:
    """Return the bytes of rows that leave by a link in one direction of one batch: two transfers of
    each MoE."""
    rows = (
        2
        * setting.moe_blocks
        * setting.top_k_of(block)
        * setting.tokens
        * through_link(ranks, setting.nodes)
    )
    return rows * setting.dim * getattr(torch, setting.dtype).itemsize


def rows_over_gradients(setting: Setting, ranks: int, found: Measured, block: str) -> float:
    """Return the bytes of rows over the bytes of gradients that a rank sends in one training step,
    the latter by a ring of all ranks."""
    gradients = 2 * (1 - 1 / ranks) * gradient_mb(found, block) * 2**20
    return 2 * setting.accumulate * row_bytes(setting, ranks, block) / gradients


def all_quartiles(values: Any) -> list[float]:
    first, third = quartiles(values)
    return [first, middle(values), third]


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


def least_times(setting: Setting, ranks: int, found: Measured, block: str) -> Any:
    """Return the least time of an iteration in each round, from its times without transfers. A ring
    sends 2 (ranks - 1) / ranks of the gradients' bytes, all of them beside the last batch's
    backward."""
    assert found.rate is not None
    alone, batches = way_of(found, block, "alone"), setting.accumulate
    bytes_per_s = found.rate * 1e6 / 8 * PAYLOAD
    rows = row_bytes(setting, ranks, block) / bytes_per_s
    sums = [
        (part, 2 * (1 - 1 / ranks) * size / bytes_per_s) for part, size in found.gradients[block]
    ]
    forward, backward = alone.train_forward / batches, (alone.backward - alone.update) / batches
    least = []
    for f, b, update in zip(forward, backward, alone.update, strict=True):
        before = (batches - 1) * least_time(f, b, 0.0, rows, [])
        least.append(before + least_time(f, b, update, rows, [(part * b, s) for part, s in sums]))
    return np.asarray(least)


def operators_ms(times: OperatorTimes) -> dict[str, dict[str, float]]:
    """Return the times of a row's operators from the gate on, one at a time, forward and in
    training."""
    forward = {op: 1e3 * seconds for op, seconds in times.forward.items() if seconds}
    return {
        "forward": forward,
        "train": {op: ms + 1e3 * times.backward[op] for op, ms in forward.items()},
    }
