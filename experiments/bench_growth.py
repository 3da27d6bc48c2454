"""`python -m experiments.bench growth`: how the time of a pair of blocks, and what overlap saves of it, grow.

    tokens    of a rank, twice and four times as many; emulated compute, links as at the first
    ranks     2, 4, 8 with as many tokens each; emulated compute, links for the same communication share at each
    experts   8, 32, 128 for the same tokens; real compute, links as at the first

Each point is measured as by `bench overlap`: variants in turn, ratios taken within a round, medians. Points are
measured one after another, so compare their ratios; times of a shared machine drift between them. Writes a chart
under --out; the last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench_overlap import at_least_two, summary
from scmoe.testbed import links
from scmoe.testbed.overlap import measure
from scmoe.testbed.pairs import Setting
from scmoe.testbed.ranks import run_ranks

POINTS = {"tokens": (512, 1024, 2048), "ranks": (2, 4, 8), "experts": (8, 32, 128)}
ROWS = {
    "top2": ("standard top-2", "#e15759"),
    "shared_expert": ("shared expert", "#76b7b2"),
    "scmoe_pos2": ("ScMoE Pos-2", "#4e79a7"),
    "scmoe_pos2_pipelined": ("ScMoE Pos-2, pipelined", "#f28e2b"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench growth", description=__doc__.split("\n")[0])
    parser.add_argument("--of", nargs="+", choices=POINTS, default=list(POINTS), help="what grows; all three")
    parser.add_argument("--points", nargs="+", type=int, help="its values, with one --of")
    parser.add_argument("--rounds", type=at_least_two, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the chart and the figures")
    options = parser.parse_args(arguments)
    if options.points and len(options.of) > 1:
        parser.error("--points goes with one --of")
    if not links.inside() and (missing := links.why_not()):
        print(f"error: links cannot be shaped here: {missing}", file=sys.stderr)
        return 2
    links.enter(["-m", "experiments.bench", "growth", *arguments])
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, list[dict[str, Any]]] = {of: [] for of in options.of}
    for of, found in report.items():
        for value in options.points or POINTS[of]:
            found.append(point(of, value, found[0]["link_mbit"] if found else None, options.rounds))
            (options.out / "growth.json").write_text(json.dumps(report, indent=1))
    show(report)
    draw(report, options.out / "growth.png")
    print(f"chart and figures: {options.out / 'growth'}.png, .json", file=sys.stderr)
    print(json.dumps(report))
    return 0


def point(of: str, value: int, link_mbit: float | None, rounds: int) -> dict[str, Any]:
    """The report of `bench overlap`, with the value under the name of what grows."""
    print(f"{of}: {value}", file=sys.stderr)
    setting, ranks = at(of, value, link_mbit, rounds)
    result = run_ranks(measure, ranks, setting, True, timeout_s=1800, own_links=True)[0]
    return {**summary(setting, ranks, result), of: value}


def at(of: str, value: int, link_mbit: float | None, rounds: int) -> tuple[Setting, int]:
    """What is measured at a point, and on how many ranks. link_mbit: of the first point, which has none."""
    if of == "tokens":
        attention_ms = 45.0 * value / 1024
        return Setting(0.52, link_mbit, rounds=rounds, tokens=value, attention_ms=attention_ms, rows=tuple(ROWS)), 2
    if of == "ranks":  # longer operators: 8 ranks share the processors that carry their transfers
        return Setting(0.35, rounds=rounds, attention_ms=90.0, rows=tuple(ROWS)), value
    return Setting(0.52, link_mbit, compute="real", rounds=rounds, num_experts=value, rows=tuple(ROWS)), 2


def show(report: dict[str, list[dict[str, Any]]]) -> None:
    for of, points in report.items():
        table = Table(title=f"{of}: {points[0]['compute']} compute; speed-ups over top-2", title_justify="left")
        for column in (of, "ranks", "Mbit/s", "share", "limit fwd", "train", "top-2 train"):
            table.add_column(column, justify="right", no_wrap=True)
        for word, _ in list(ROWS.values())[1:]:
            table.add_column(f"{word}: fwd, train", justify="right")
        for p in points:
            limits = (f"{p[f'limit_{kind}']:.2f}" for kind in ("forward", "train"))
            rows = (f"{r['forward_speedup']:.2f}, {r['train_speedup']:.2f}" for r in list(p["rows"].values())[1:])
            first = (str(p[of]), str(p["ranks"]), f"{p['link_mbit']:.0f}", f"{p['comm_share']:.2f}")
            table.add_row(*first, *limits, f"{p['rows']['top2']['train_ms']:.0f} ms", *rows)
        Console(width=150).print(table)


def draw(report: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each thing that grows: time of a training step, both axes logarithmic, speed-up under Pos-2's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(4.2 * len(report), 4.2), layout="constrained")
    axes = figure.subplots(1, len(report), squeeze=False)[0]
    for axis, (of, points) in zip(axes, report.items(), strict=True):
        values = [p[of] for p in points]
        for name, (word, color) in ROWS.items():
            times = [p["rows"][name]["train_ms"] for p in points]
            axis.plot(values, times, "o-", color=color, label=word)
        for p in points:
            row, color = p["rows"]["scmoe_pos2"], ROWS["scmoe_pos2"][1]
            text, where = f"{row['train_speedup']:.2f} x", (p[of], row["train_ms"])
            axis.annotate(text, where, (0, -18), textcoords="offset points", ha="center", fontsize=8, color=color)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
        axis.yaxis.set_major_locator(MaxNLocator(6))  # a panel may span less than the powers of two are apart
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.margins(0.15)
        axis.set_xlabel("tokens of a rank" if of == "tokens" else of)
        axis.set_title(f"{of}, {points[0]['compute']} compute", loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("forward + backward of a pair, ms")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
