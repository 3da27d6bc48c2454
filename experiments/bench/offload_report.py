"""Fig. 13: latency and memory of resident and offloaded experts, the paper's values beside ours."""

import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from scmoe.config.extras import require
from scmoe.experiments.bench.offload import ARCHITECTURES, RESIDENT, Setting, measure
from scmoe.experiments.bench.speed_chart import name_of
from scmoe.probes.charts import BLUE, PAPER, RED, SKY, Bar, bar_legend, chart, grouped_bars, heading, height_of, title

QUICK: dict[str, Any] = dict(
    dim=64, ffn_dim=128, heads=2, pairs=2, tokens=(1, 8), rounds=2, limit_s=2.0, max_wait=float("inf")
)
# Blocking's extra latency over an MoE block's; the share of it that migration hides; the share of peak memory saved
PAPERS = {"GPT2-MoE-Medium": (0.8, 0.75, 0.5), "GPT3-MoE-XL": (2.4, 0.25, 0.6)}
COLORS = {"blocking": RED, "determinate": BLUE, "speculative": SKY}


def bench_offload(out: Path, setting: Setting) -> dict[str, Any]:
    """Measure every architecture, print tables, write chart and figures into `out`; return the rows of one token."""
    require("fig13", "matplotlib")
    report, rates = dict[str, Any](), None
    for architecture in sorted(setting.architectures, key=list(ARCHITECTURES).index):
        print(f"measuring {name_of(architecture)}", file=sys.stderr)
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            report[architecture] = alone.submit(measure, setting, architecture, rates).result()
        rates = report[architecture]["rates"]
    out.mkdir(parents=True, exist_ok=True)
    show(report, setting)
    found = {"rows": rows(report), "equal_bits": equal_bits(report)}
    whole = {**found, "setting": asdict(setting), "architectures": report}
    (out / "figure-13.json").write_text(json.dumps(whole, indent=1))
    draw(whole, out / "figure-13.png")
    print(f"chart and figures: {out / 'figure-13'}.png, .json", file=sys.stderr)
    return found


def rows(report: dict[str, Any]) -> dict[str, Any]:
    """Return {architecture: {way: figures}} of the first case, which has the fewest tokens and the lowest cost."""
    found = {}
    for architecture, own in report.items():
        case, peaks = own["cases"][0], own["memory"]["peak_mb"]
        same = {"tokens": case["tokens"], "rate_mb_s": case["rate_mb_s"]}
        found[architecture] = {w: {**f, "peak_mb": peaks[w], **same} for w, f in case["ways"].items()}
    return found


def equal_bits(report: dict[str, Any]) -> bool:
    return all(case["equal_bits"] for own in report.values() for case in own["cases"])


def show(report: dict[str, Any], setting: Setting) -> None:
    s = setting
    title = (
        f"width {s.dim}, {s.ffn_dim} in an expert, {s.num_experts} experts, {s.pairs} MoE layers, fp32, one thread; "
        f"a time is kept if the process waited for a core during at most {s.max_wait:.0%} of it; medians"
    )
    names = ["tokens", "MB/s", "resident ms", "window ms", "fetch ms", "blocking", "determinate", "hidden", "bound"]
    names += ["speculative", "hidden", "hit rate", "kept"]
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table("architecture", *columns, title=title, title_justify="left")
    for architecture, own in report.items():
        for case in own["cases"]:
            first = (name_of(architecture), str(case["tokens"]), f"{case['rate_mb_s']:.0f}")
            kept = f"{case['kept']} of {case['tried']}"
            if not (ways := case["ways"]):
                table.add_row(*first, *[""] * 10, kept)
                continue
            resident, known, guessed = (ways[w] for w in (RESIDENT, "determinate", "speculative"))
            ms = [f"{x:.1f}" for x in (resident["latency_ms"], case["window_ms"], case["fetch_ms"])]
            more = {way: f"{f['latency_ms'] / resident['latency_ms'] - 1:+.0%}" for way, f in ways.items()}
            shares = [f"{known[name]:.0%}" for name in ("hidden", "bound")]
            guesses = more["speculative"], f"{guessed['hidden']:.0%}", f"{guessed['hit_rate']:.0%}"
            table.add_row(*first, *ms, more["blocking"], more["determinate"], *shares, *guesses, kept)
    memory = Table("architecture", "fixed MB", RESIDENT, *COLORS, title="peak beyond the fixed weights, MB")
    for architecture, own in report.items():
        peaks = own["memory"]["peak_mb"]
        whole = peaks[RESIDENT] or math.nan  # experts of --quick fit into pages that the process has
        numbers = (f"{peaks[way]:.0f} ({peaks[way] / whole:.2f})" for way in (RESIDENT, *COLORS))
        memory.add_row(name_of(architecture), f"{own['memory']['fixed_mb']:.0f}", *numbers)
    for each in (table, memory):
        Console(stderr=True, width=170).print(each)
    print(f"equal bits: {equal_bits(report)}", file=sys.stderr)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a panel for each rate, latency over that of resident experts, and one for the memory."""
    report, tokens = found["architectures"], min(found["setting"]["tokens"])
    rates = next(iter(report.values()))["rates"]
    panels = {}
    for rate, model in zip(rates, PAPERS, strict=False):
        words = f"MoE block, {tokens} token{'s' if tokens > 1 else ''}, experts fetched at {rate / 1e3:.1f} GB/s"
        panels[f"{words}:\n% longer than with resident experts"] = latency_bars(report, rate, model)
    panels["Peak memory, fixed weights and experts or slots:\n% of that with resident experts"] = memory_bars(report)
    heights = [height_of(groups) for groups in panels.values()]
    with chart(path, 0.9 + 0.8 * len(panels) + sum(heights)) as figure:
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        for axis, (words, groups) in zip(axes, panels.items(), strict=True):
            grouped_bars(axis, groups, room=0.22)
            title(axis, words)
        heading(figure, "Fig. 13: experts fetched while the backbone runs, on one CPU")
        names = COLORS | {"paper (its machine)": PAPER}
        bar_legend(figure, names)


def latency_bars(report: dict[str, Any], rate: float, model: str) -> dict[str, list[Bar]]:
    """Return how much longer a block takes at this rate, in %, and the paper's model for which the rate stands."""
    cost, hidden, _ = PAPERS[model]
    groups = {model: [percent(share, PAPER, f" {way}") for way, share in paper_ways(cost, hidden).items()]}
    for architecture, own in report.items():
        case = next(case for case in own["cases"] if case["rate_mb_s"] == rate)
        if ways := case["ways"]:
            resident = ways[RESIDENT]["latency_ms"]
            more = {way: ways[way]["latency_ms"] / resident - 1 for way in COLORS if way in ways}
            groups[name_of(architecture)] = [percent(share, COLORS[way]) for way, share in more.items()]
    return groups


def paper_ways(cost: float, hidden: float) -> dict[str, float]:
    return {"blocking": cost, "determinate": cost * (1 - hidden)}


def memory_bars(report: dict[str, Any]) -> dict[str, list[Bar]]:
    """Return all weights on the device and the activations, as a share of that with resident experts."""
    groups = {model: [percent(1 - less, PAPER)] for model, (_, _, less) in PAPERS.items()}
    for architecture, own in report.items():
        fixed, peaks = own["memory"]["fixed_mb"], own["memory"]["peak_mb"]
        share = (fixed + peaks["determinate"]) / (fixed + peaks[RESIDENT])
        groups[name_of(architecture)] = [percent(share, COLORS["determinate"])]
    return groups


def percent(share: float, color: str, words: str = "") -> Bar:
    return Bar(100 * share, color, f"{100 * share:.0f}{words}")
