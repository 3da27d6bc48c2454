"""The report of `bench overlap`: how much of the All-to-All every architecture and schedule hides.

Ratios are to sequential top-2, taken round by round, medians.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from statistics import median, quantiles
from typing import Any

import torch
from numpy import asarray
from rich.console import Console
from rich.table import Column, Table

from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench.exchange import why_no_nodes
from scmoe.experiments.bench.overlap import Seconds, Variant, measure, through_link
from scmoe.experiments.bench.pairs import ROWS, TOP_K, Setting, default_schedule
from scmoe.experiments.bench.speed_chart import draw, ranks_of
from scmoe.experiments.engine import links
from scmoe.experiments.engine.ranks import run_ranks
from scmoe.schedule.cost import OperatorTimes, exposed_time, overlap_efficiency
from scmoe.schedule.limit import least_time

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Setting)}
KINDS = ("forward", "train")
PAYLOAD = 1448 / 1514  # of what a link carries; the rest is headers of TCP, IP and Ethernet
OF_COMPUTE = {"ffn_dim": "real", "heads": "real", "attention_ms": "emulated", "attention_to_mlp": "emulated"}


def bench_overlap(options: dict[str, Any]) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Returns the report.

    options: fields of Setting, `ranks` and `out`, those that were given; ConfigError for one that cannot be honoured.
    The program starts again in a network namespace, where links can be shaped.
    """
    require("bench overlap", "matplotlib")
    gpu, out = options["device"] == "cuda", options.pop("out")
    defaults = DEFAULTS | {"share": 0.52, "ranks": 1 if gpu else 2, "compute": "real" if gpu else "emulated"}
    defaults["reductions"] = "ddp" if gpu else "paced"
    values = defaults | options
    if refused := why_refused(options, values):
        raise ConfigError(refused)
    missing = "one GPU has no links" if gpu else links.why_not() if not links.inside() else None
    if missing is None:
        links.enter(values["nodes"])
    elif not gpu:
        print(f"links cannot be shaped here ({missing}): loopback as it is, marked in every row", file=sys.stderr)
    ranks, rows = values.pop("ranks"), tuple(values["rows"])
    setting = Setting(**values | {"rows": rows, "shaped": missing is None, "bus": gpu})
    own_links = missing is None
    result = run_ranks(measure, ranks, setting, timeout_s=3600, own_links=own_links, nodes=setting.nodes)[0]
    report = summary(setting, ranks, result)
    machine = "cuda" if gpu else f"{ranks}-ranks"
    if setting.nodes > 1:
        machine += f"-{setting.nodes}-nodes-{setting.exchange}"
    at = f"share-{setting.share:g}" if setting.link_mbit is None else f"{setting.link_mbit:g}-mbit"
    name = f"overlap-{setting.compute}-{setting.level}-{machine}-{at}"
    show(report)
    draw(report, out / f"{name}.png")
    (out / f"{name}.json").write_text(json.dumps(report, indent=1))
    print(f"chart and figures: {out / name}.png, .json", file=sys.stderr)
    return report


def why_refused(given: dict[str, Any], values: dict[str, Any]) -> str | None:
    """Return why the first option that cannot be honoured is refused; None: all can. values: given, or defaults."""
    if given["device"] == "cuda":
        if "link_mbit" in given:
            return "--link-mbit belongs to links, and one GPU has none: its rows go over its bus"
        if values["ranks"] != 1:
            return f"--ranks is {values['ranks']}, allowed with --device cuda: 1"
        if values["compute"] != "real":
            return "--compute is emulated, allowed with --device cuda: real (a host that sleeps keeps no GPU busy)"
        if not torch.cuda.is_available():
            return "--device is cuda, and there is no CUDA device here"
    elif values["ranks"] < 2:
        return f"--ranks is {values['ranks']}, allowed: 2 or more, as one rank sends nothing"
    if values["nodes"] != 1 and (refused := why_no_nodes(values["nodes"], values["ranks"])):
        return refused
    if values["nodes"] == 1 and values["exchange"] != "flat":
        return f"--exchange is {values['exchange']}, allowed with --nodes 1: flat"
    if "share" in given and "link_mbit" in given:
        return "--share and --link-mbit exclude each other: the rate is searched for the share, or given"
    if "reductions" in given and values["level"] != "iteration":
        return f"--reductions belongs to --level iteration, and --level is {values['level']}"
    for name, compute in OF_COMPUTE.items():
        if name in given and compute != values["compute"]:
            return f"--{name.replace('_', '-')} belongs to {compute} compute, and --compute is {values['compute']}"
    if not 0 < values["share"] < 1:
        return f"--share is {values['share']:g}, allowed: above 0 and below 1"
    if unknown := [row for row in values["rows"] if row not in ROWS]:
        return f"--rows has {unknown[0]}, allowed: {' | '.join(ROWS)}"
    return why_uneven(*(values[name] for name in ("tokens", "seq_len", "num_experts", "ranks")))


def why_uneven(tokens: int, seq_len: int, num_experts: int, ranks: int) -> str | None:
    """Return why tokens cannot be cut into sequences, or experts be shared by ranks; None: both can."""
    if tokens % seq_len:
        return f"--tokens is {tokens}, allowed: multiples of --seq-len ({seq_len})"
    if num_experts % ranks:
        return f"--num-experts is {num_experts}, allowed: multiples of --ranks ({ranks})"
    return None


def summary(setting: Setting, ranks: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of the rounds, by row. result: what `measure` returned on rank 0."""
    times = result["times"]
    best = {name: times[variant] for name, variant in result["best"].items()}
    iteration = setting.level == "iteration"

    def references(block: str) -> list[Seconds]:
        return [times[Variant(block, default_schedule(block), way)] for way in ("sequential", "free")]

    baseline, baseline_free = references("top2")
    limited = iteration and setting.shaped  # a limit with gradients needs the rate of the links

    def least(block: str) -> Any:
        alone = times[Variant(block, default_schedule(block), "alone")]
        return least_times(setting, ranks, result["rate"], block, alone, result["gradients"][block])

    def gradient_mb(block: str) -> float:
        return sum(size for _, size in result["gradients"][block]) / 2**20

    def row(name: str) -> dict[str, Any]:
        schedule, chosen = result["best"][name].schedule, result["chosen"][name]
        own, block = best[name], ROWS[name][0]
        sequential, free = references(block)
        forward, train = baseline.forward / own.forward, baseline.train / own.train
        exposed = setting.pairs * exposed_time(schedule, result["choices"][name].times[schedule.chunks])
        return {
            "forward_ms": 1e3 * median(own.forward),
            "train_ms": 1e3 * median(own.train),
            "forward_speedup": median(forward),
            "train_speedup": median(train),
            "forward_quartiles": quantiles(forward, n=4)[::2],
            "train_quartiles": quantiles(train, n=4)[::2],
            "overlap_forward": median(overlap_efficiency(own.forward, sequential.forward, free.forward)),
            "overlap_backward": median(overlap_efficiency(own.backward, sequential.backward, free.backward)),
            "slot": schedule.slot,
            "chunks": schedule.chunks,
            "auto_slot": chosen.schedule.slot,
            "auto_chunks": chosen.schedule.chunks,
            "auto_over_best": median(times[chosen].train / own.train),
            "measured_over_model": median(own.train) / (median(free.train) + exposed),
            "peak_mb": result["peaks"][name],
            "links": "bus" if setting.bus else "shaped" if setting.shaped else "loopback",
            "compute": setting.compute,
            **({"gradient_mb": gradient_mb(block)} if iteration else {}),
            **({"limit_train": median(baseline.train / least(block))} if limited else {}),
            **({"of_limit": median(least(block) / own.train)} if limited else {}),
        }

    def over(reference: str) -> dict[str, Any]:
        """Return the quartiles of each row's times over those of one row."""

        def quartiles(own: Seconds, kind: str) -> list[float]:
            return quantiles(getattr(own, kind) / getattr(best[reference], kind), n=4)

        return {kind: {name: quartiles(own, kind) for name, own in best.items()} for kind in KINDS}

    rows = {name: row(name) for name in setting.rows}
    scmoe = min((name for name in rows if name.startswith("scmoe")), key=lambda n: rows[n]["train_ms"], default=None)
    fastest = max(rows, key=lambda name: rows[name]["forward_speedup"])
    limit_forward = median(baseline.forward / baseline_free.forward)
    return {
        "wanted_share": setting.share if setting.link_mbit is None else None,
        "comm_share": 1 - 1 / limit_forward,
        "link_mbit": None if setting.bus else result["rate"],
        **({"bus_rate": result["rate"]} if setting.bus else {}),
        "ranks": ranks,
        **({"nodes": setting.nodes, "exchange": setting.exchange} if setting.nodes > 1 else {}),
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "compute": setting.compute,
        "level": setting.level,
        **({"gradient_mb": gradient_mb("top2"), "reductions": setting.reductions} if iteration else {}),
        "rounds": setting.rounds,
        "iterations": result["iterations"],
        "limit_forward": limit_forward,
        "limit_train": median(baseline.train / (least("top2") if limited else baseline_free.train)),
        "transfer_cpu_ms_forward": median(1e3 * baseline.cpu_forward - 1e3 * baseline_free.cpu_forward),
        "transfer_cpu_ms_train": median(1e3 * baseline.cpu_train - 1e3 * baseline_free.cpu_train),
        "fastest_forward": {
            "row": fastest,
            "over": {name: median(own.forward / best[fastest].forward) for name, own in best.items()},
        },
        **({"fastest_scmoe": {"row": scmoe, "over": over(scmoe)}} if scmoe else {}),
        **({"top2_operators_ms": operators_ms(result["choices"]["top2"].times[1])} if "top2" in rows else {}),
        "rows": rows,
    }


def least_times(
    setting: Setting, ranks: int, mbit: float, block: str, alone: Seconds, gradients: Sequence[tuple[float, int]]
) -> Any:
    """Return the least time of an iteration in each round, by schedule/limit.py. alone: times without transfers.
    gradients: when each can start, as a part of backward, and its bytes. A ring sends 2 (ranks - 1) / ranks of them."""
    bytes_per_s, sent = mbit * 1e6 / 8 * PAYLOAD, 1 - 1 / ranks
    of_a_rank = 2 * setting.pairs * TOP_K.get(block, 1) * setting.tokens * setting.dim * 4
    rows = of_a_rank * through_link(ranks, setting.nodes) / bytes_per_s
    sums = [(part, 2 * sent * size / bytes_per_s) for part, size in gradients]
    rounds = zip(alone.train_forward, alone.backward - alone.update, alone.update, strict=True)
    return asarray([least_time(f, b, u, rows, [(part * b, s) for part, s in sums]) for f, b, u in rounds])


def operators_ms(times: OperatorTimes) -> dict[str, dict[str, float]]:
    """Return the times of a row's operators from the gate on, one at a time, forward and in training."""
    forward = {op: 1e3 * seconds for op, seconds in times.forward.items() if seconds}
    return {"forward": forward, "train": {op: ms + 1e3 * times.backward[op] for op, ms in forward.items()}}


def show(report: dict[str, Any]) -> None:
    title = (
        f"{report['compute']} compute, {ranks_of(report)}, {report['level']}, communication share "
        f"{report['comm_share']:.2f}; limit {report['limit_forward']:.2f} forward, {report['limit_train']:.2f} "
        f"training; medians of {report['rounds']} rounds, [quartiles]"
    )
    columns = ["forward", "training", "hidden fwd", "bwd", "slot x chunks", "auto", "/ best", "/ model", "peak"]
    columns += ["of its limit"] * ("reductions" in report)
    numbers = (Column(column, justify="right", no_wrap=True) for column in columns)
    table = Table(Column("row", no_wrap=True), *numbers, title=title, title_justify="left")
    cell = "{:.2f} [{:.2f} {:.2f}]".format
    for name, r in report["rows"].items():
        speed = [cell(r[f"{kind}_speedup"], *r[f"{kind}_quartiles"]) for kind in ("forward", "train")]
        hidden = [f"{100 * r[f'overlap_{d}']:.0f} %" for d in ("forward", "backward")]
        schedules = f"{r['slot']} x {r['chunks']}", f"{r['auto_slot']} x {r['auto_chunks']}"
        ratios = [f"{r[k]:.3f}" for k in ("auto_over_best", "measured_over_model")]
        of_limit = [f"{r['of_limit']:.3f}"] if "of_limit" in r else []
        table.add_row(name, *speed, *hidden, *schedules, *ratios, f"{r['peak_mb']:.0f} MB", *of_limit)
    Console(stderr=True, width=150).print(table)
