"""The report of `bench overlap`: how much of the All-to-All every architecture and schedule hides.

All schedules of a row are tried, and those near the best, with the planner's choice, go into the rounds, which decide.
Ratios are to sequential top-2, taken round by round, medians.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from scmoe.config.fields import ConfigError
from scmoe.schedule.cost import exposed_time, overlap_efficiency
from scmoe.schedule.schedule import Schedule
from scmoe.testbed import links
from scmoe.testbed.overlap import Variant, measure
from scmoe.testbed.pairs import ROWS, Setting, default_schedule
from scmoe.testbed.ranks import run_ranks

DEFAULTS = {field.name: field.default for field in fields(Setting)}
OF_COMPUTE = {"ffn_dim": "real", "heads": "real", "attention_ms": "emulated", "attention_to_mlp": "emulated"}


def bench_overlap(options: dict[str, Any], again: Sequence[str]) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Returns the report.

    options: fields of Setting, `ranks` and `out`, those that were given; ConfigError for one that cannot be honoured.
    again: the arguments of a Python interpreter that repeat this program, which continues in a network namespace.
    """
    gpu, out = options["device"] == "cuda", options.pop("out")
    if refused := why_refused(options):
        raise ConfigError(refused)
    ranks = options.pop("ranks", 1 if gpu else 2)
    missing = "one GPU has no links" if gpu else links.why_not() if not links.inside() else None
    if missing is None:
        links.enter(again)
    elif not gpu:
        print(f"links cannot be shaped here ({missing}): loopback as it is, marked in every row", file=sys.stderr)
    defaults = {"share": 0.52, "compute": "real" if gpu else "emulated"}
    setting = Setting(**defaults | options | {"rows": tuple(options.get("rows", ROWS))}, shaped=missing is None)
    result = run_ranks(measure, ranks, setting, True, timeout_s=3600, own_links=missing is None)[0]
    report = summary(setting, ranks, result)
    name = f"overlap-{setting.compute}-{setting.level}-" + ("cuda" if gpu else f"{ranks}-ranks-share-{setting.share:g}")
    show(report)
    draw(report, out / f"{name}.png")
    (out / f"{name}.json").write_text(json.dumps(report, indent=1))
    print(f"chart and figures: {out / name}.png, .json", file=sys.stderr)
    return report


def why_refused(options: dict[str, Any]) -> str | None:
    """Return why the first option that cannot be honoured is refused; None: all can. options: those that were given."""
    if options["device"] == "cuda":
        for name in ("share", "link_mbit"):
            if name in options:
                return f"--{name.replace('_', '-')} belongs to links, and one GPU has none: its rows go over its bus"
        if options.get("ranks", 1) != 1:
            return f"--ranks is {options['ranks']}, allowed with --device cuda: 1"
        if options.get("compute", "real") != "real":
            return "--compute is emulated, allowed with --device cuda: real (a host that sleeps keeps no GPU busy)"
        if not torch.cuda.is_available():
            return "--device is cuda, and there is no CUDA device here"
    if "share" in options and "link_mbit" in options:
        return "--share and --link-mbit exclude each other: the rate is searched for the share, or given"
    compute = options.get("compute", "real" if options["device"] == "cuda" else "emulated")
    for name, other in OF_COMPUTE.items():
        if name in options and other != compute:
            return f"--{name.replace('_', '-')} belongs to {other} compute, and --compute is {compute}"
    if not 0 < options.get("share", 0.52) < 1:
        return f"--share is {options['share']:g}, allowed: above 0 and below 1"
    tokens, seq_len, num_experts = (options.get(name, DEFAULTS[name]) for name in ("tokens", "seq_len", "num_experts"))
    if unknown := [row for row in options.get("rows", ()) if row not in ROWS]:
        return f"--rows has {unknown[0]}, allowed: {' | '.join(ROWS)}"
    if tokens % seq_len:
        return f"--tokens is {tokens}, allowed: multiples of --seq-len ({seq_len})"
    if num_experts % options.get("ranks", 2):
        return f"--num-experts is {num_experts}, allowed: multiples of --ranks ({options.get('ranks', 2)})"
    return None


def summary(setting: Setting, ranks: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of the rounds, by row. result: what `measure` returned on rank 0."""
    times = result["times"]
    baseline = times[Variant("top2", Schedule("top_k"), "sequential")]
    free = times[Variant("top2", Schedule("top_k"), "free")]
    links_word = "shaped" if setting.shaped else "loopback" if setting.device == "cpu" else "bus"
    iteration = setting.level == "iteration"

    def ratios(kind: str, variant: Variant) -> list[float]:
        return [getattr(b, kind) / getattr(v, kind) for b, v in zip(baseline, times[variant], strict=True)]

    def row(name: str) -> dict[str, Any]:
        best, chosen, choice = result["best"][name], result["chosen"][name], result["choices"][name]
        block = ROWS[name][0]
        ways = [times[Variant(block, default_schedule(block), way)] for way in ("sequential", "free")]

        def efficiency(kind: str) -> float | None:
            rounds = zip(times[best], *ways, strict=True)
            return median(overlap_efficiency(*(getattr(t, kind) for t in ts)) for ts in rounds)

        exposed = exposed_time(best.schedule, choice.times[best.schedule.chunks])
        predicted = median(t.train for t in ways[1]) + exposed
        return {
            "forward_ms": 1e3 * median(t.forward for t in times[best]),
            "train_ms": 1e3 * median(t.train for t in times[best]),
            "forward_speedup": median(ratios("forward", best)),
            "train_speedup": median(ratios("train", best)),
            "forward_quartiles": quantiles(ratios("forward", best), n=4)[::2],
            "train_quartiles": quantiles(ratios("train", best), n=4)[::2],
            "overlap_forward": efficiency("forward"),
            "overlap_backward": efficiency("backward"),
            "slot": best.schedule.slot,
            "chunks": best.schedule.chunks,
            "auto_slot": chosen.schedule.slot,
            "auto_chunks": chosen.schedule.chunks,
            "auto_over_best": median(a.train / b.train for a, b in zip(times[chosen], times[best], strict=True)),
            "measured_over_model": median(t.train for t in times[best]) / predicted,
            "peak_mb": result["peaks"][name],
            "links": links_word,
            "compute": setting.compute,
            **({"gradient_mb": result["gradients"][block]} if iteration else {}),
        }

    rows = {name: row(name) for name in setting.rows}
    fastest = max(rows, key=lambda name: rows[name]["forward_speedup"])
    best = {name: times[result["best"][name]] for name in rows}
    ours = [t.forward for t in best[fastest]]
    over = {name: median(t.forward / o for o, t in zip(ours, own, strict=True)) for name, own in best.items()}
    pairs = list(zip(baseline, free, strict=True))
    limit_forward = median(b.forward / f.forward for b, f in pairs)
    return {
        "comm_share": 1 - 1 / limit_forward,
        "link_mbit": result["rate"],
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "compute": setting.compute,
        "level": setting.level,
        **({"gradient_mb": result["gradients"]["top2"]} if iteration else {}),
        "rounds": setting.rounds,
        "iterations": result["iterations"],
        "limit_forward": limit_forward,
        "limit_train": median(b.train / f.train for b, f in pairs),
        "transfer_cpu_ms_forward": median(1e3 * b.cpu_forward - 1e3 * f.cpu_forward for b, f in pairs),
        "transfer_cpu_ms_train": median(1e3 * b.cpu_train - 1e3 * f.cpu_train for b, f in pairs),
        "fastest_forward": {"row": fastest, "over": over},
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    title = (
        f"{report['compute']} compute, {report['ranks']} ranks, {report['level']}, communication share "
        f"{report['comm_share']:.2f}; limit {report['limit_forward']:.2f} forward, {report['limit_train']:.2f} "
        f"training; medians of {report['rounds']} rounds, [quartiles]"
    )
    table = Table(title=title, title_justify="left")
    columns = ("row", "forward", "training", "hidden fwd", "bwd", "slot x chunks", "auto", "/ best", "/ model", "peak")
    for column in columns:
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for name, r in report["rows"].items():
        speed = [
            "{:.2f} [{:.2f} {:.2f}]".format(r[f"{kind}_speedup"], *r[f"{kind}_quartiles"])
            for kind in ("forward", "train")
        ]
        hidden = [f"{100 * r[f'overlap_{d}']:.0f} %" for d in ("forward", "backward")]
        schedules = f"{r['slot']} x {r['chunks']}", f"{r['auto_slot']} x {r['auto_chunks']}"
        ratios = [f"{r[k]:.3f}" for k in ("auto_over_best", "measured_over_model")]
        table.add_row(name, *speed, *hidden, *schedules, *ratios, f"{r['peak_mb']:.0f} MB")
    Console(width=150).print(table)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw bars of both speed-ups, quartiles as whiskers, the limits as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axis = figure.subplots()
    rows = list(report["rows"].items())
    kinds = (("forward", "#4e79a7", "forward", -0.19), ("train", "#f28e2b", "forward + backward", 0.19))
    for kind, color, word, shift in kinds:
        values = [r[f"{kind}_speedup"] for _, r in rows]
        errors = [[abs(r[f"{kind}_quartiles"][q] - r[f"{kind}_speedup"]) for _, r in rows] for q in (0, 1)]
        places = [x + shift for x in range(len(rows))]
        bars = axis.bar(places, values, 0.36, color=color, yerr=errors, ecolor="#555555", label=word)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a limit's line may cross a figure
        axis.bar_label(bars, [f"{v:.2f}" for v in values], fontsize=8, padding=2, bbox=behind)
        limit = report[f"limit_{kind}"]
        axis.axhline(limit, color=color, linestyle="--", linewidth=1, zorder=0, label=f"all hidden, {word}")
    axis.set_xticks(range(len(rows)), [name.replace("_", "\n") for name, _ in rows], fontsize=8)
    axis.set_ylabel("speed-up over sequential top-2")
    words = {"loopback": "loopback as it is", "bus": f"rows over the bus of a {report['device']}"}
    links = f"{report['link_mbit']:.0f} Mbit/s links" if report["link_mbit"] else words[rows[0][1]["links"]]
    what = "pair of blocks" if report["level"] == "block" else "iteration"
    where = f"{report['compute']} compute, {report['ranks']} ranks, {links}"
    axis.set_title(f"One {what}, {where}: {100 * report['comm_share']:.0f} % communication", loc="left", fontsize=11)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
