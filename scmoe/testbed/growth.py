"""How the time of a pair of blocks, and what overlap saves of it, grow with tokens, ranks and experts.

    tokens    per rank, twice and four times as many; emulated compute, links as at the first point
    ranks     2, 4, 8 with as many tokens each; emulated compute, links for the same communication share at each
    experts   8, 32, 128 for the same tokens; real compute, links as at the first point

Each point is measured as by `bench overlap`. Points are measured one after another, so compare their ratios: times of a
shared machine drift between them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from scmoe.charts import chart
from scmoe.config.extras import require
from scmoe.testbed.overlap import measure
from scmoe.testbed.overlap_report import summary
from scmoe.testbed.pairs import Setting
from scmoe.testbed.ranks import run_ranks

POINTS = {"tokens": (512, 1024, 2048), "ranks": (2, 4, 8), "experts": (8, 32, 128)}
ROWS = {
    "top2": ("standard top-2", "#e15759"),
    "shared_expert": ("shared expert", "#76b7b2"),
    "scmoe_pos2": ("ScMoE Pos-2", "#4e79a7"),
    "scmoe_pos2_pipelined": ("ScMoE Pos-2, pipelined", "#f28e2b"),
}


def bench_growth(of: Sequence[str], points: Sequence[int] | None, rounds: int, out: Path) -> dict[str, Any]:
    """Measure every point, print tables, and write chart and figures into `out`. Returns the reports by what grows.

    of: keys of POINTS. points: values for a single key. The caller has entered a network namespace (links.py).
    """
    require("bench growth", "matplotlib")
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, list[dict[str, Any]]] = {name: [] for name in of}
    for name, found in report.items():
        for value in points or POINTS[name]:
            print(f"{name}: {value}", file=sys.stderr)
            setting, ranks = at(name, value, found[0]["link_mbit"] if found else None, rounds)
            result = run_ranks(measure, ranks, setting, timeout_s=1800, own_links=True)[0]
            found.append({**summary(setting, ranks, result), name: value})
            (out / "growth.json").write_text(json.dumps(report, indent=1))
    show(report)
    draw(report, out / "growth.png")
    print(f"chart and figures: {out / 'growth'}.png, .json", file=sys.stderr)
    return report


def at(of: str, value: int, link_mbit: float | None, rounds: int) -> tuple[Setting, int]:
    """Return a point's setting and number of ranks. link_mbit: that of the first point; None: this is the first."""
    if of == "tokens":
        attention_ms = 45.0 * value / 1024
        return Setting(0.52, link_mbit, rounds=rounds, tokens=value, attention_ms=attention_ms, rows=tuple(ROWS)), 2
    if of == "ranks":  # longer operators: 8 ranks share the processors that carry their transfers
        return Setting(0.35, rounds=rounds, attention_ms=90.0, rows=tuple(ROWS)), value
    return Setting(0.52, link_mbit, compute="real", rounds=rounds, num_experts=value, rows=tuple(ROWS)), 2


def show(report: dict[str, list[dict[str, Any]]]) -> None:
    for of, points in report.items():
        names = (of, "ranks", "Mbit/s", "share", "limit fwd", "train", "top-2 train")
        columns = [Column(name, justify="right", no_wrap=True) for name in names]
        columns += [Column(f"{word}: fwd, train", justify="right") for word, _ in list(ROWS.values())[1:]]
        title = f"{of}: {points[0]['compute']} compute; speed-ups over top-2"
        table = Table(*columns, title=title, title_justify="left")
        for p in points:
            limits = (f"{p[f'limit_{kind}']:.2f}" for kind in ("forward", "train"))
            rows = (f"{r['forward_speedup']:.2f}, {r['train_speedup']:.2f}" for r in list(p["rows"].values())[1:])
            first = (str(p[of]), str(p["ranks"]), f"{p['link_mbit']:.0f}", f"{p['comm_share']:.2f}")
            table.add_row(*first, *limits, f"{p['rows']['top2']['train_ms']:.0f} ms", *rows)
        Console(width=150).print(table)


def draw(report: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a panel for each thing that grows: time of a training step, both axes logarithmic, Pos-2's speed-up."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    with chart(path, 3.4 * len(report)) as figure:
        axes = figure.subplots(len(report), 1, squeeze=False)[:, 0]
        for axis, (of, points) in zip(axes, report.items(), strict=True):
            values = [p[of] for p in points]
            for name, (word, color) in ROWS.items():
                times = [p["rows"][name]["train_ms"] for p in points]
                axis.plot(values, times, "o-", color=color, label=word)
            for p in points:
                row, color = p["rows"]["scmoe_pos2"], ROWS["scmoe_pos2"][1]
                text, where = f"{row['train_speedup']:.2f} x", (p[of], row["train_ms"])
                axis.annotate(text, where, (0, -18), textcoords="offset points", ha="center", fontsize=9, color=color)
            axis.loglog(base=2)
            axis.set_xticks(values, [str(value) for value in values])
            axis.yaxis.set_major_locator(MaxNLocator(6))  # a panel may span less than the powers of two are apart
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.margins(0.15)
            words = "tokens of a rank" if of == "tokens" else of
            axis.set(xlabel=words, ylabel="training of a pair, ms", title=f"{of}, {points[0]['compute']} compute")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
