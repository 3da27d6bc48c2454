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

from scmoe.charts import PAPER, SMALL, chart, title
from scmoe.testbed.offload import ARCHITECTURES, RESIDENT, Setting, measure

QUICK: dict[str, Any] = dict(
    dim=64, ffn_dim=128, heads=2, pairs=2, tokens=(1, 8), rounds=2, limit_s=2.0, max_wait=float("inf")
)
NAMES = {
    "scmoe_pos1": "ScMoE Pos-1",
    "scmoe_pos2": "ScMoE Pos-2",
    "scmoe_pos3": "ScMoE Pos-3",
    "shared_expert": "shared expert",
    "top2": "top-2",
}
# Blocking costs so much of a MoE block's latency, of which asynchronous migration takes away a share; peak memory less
PAPERS = {"GPT2-MoE-Medium": (0.8, 0.75, 0.5), "GPT3-MoE-XL": (2.4, 0.25, 0.6)}
COLORS = {"blocking": "#e15759", "determinate": "#4e79a7", "speculative": "#76b7b2"}


def bench_offload(out: Path, setting: Setting) -> dict[str, Any]:
    """Measure every architecture, print tables, write chart and figures into `out`; return the rows of one token."""
    report, rates = dict[str, Any](), None
    for architecture in sorted(setting.architectures, key=list(ARCHITECTURES).index):
        print(f"measuring {NAMES[architecture]}", file=sys.stderr)
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            report[architecture] = alone.submit(measure, setting, architecture, rates).result()
        rates = report[architecture]["rates"]
    out.mkdir(parents=True, exist_ok=True)
    show(report, setting)
    draw(report, setting, out / "figure-13.png")
    found = {"rows": rows(report), "equal_bits": equal_bits(report)}
    (out / "figure-13.json").write_text(
        json.dumps({**found, "setting": asdict(setting), "architectures": report}, indent=1)
    )
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
            first = (NAMES[architecture], str(case["tokens"]), f"{case['rate_mb_s']:.0f}")
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
        memory.add_row(NAMES[architecture], f"{own['memory']['fixed_mb']:.0f}", *numbers)
    for each in (table, memory):
        Console(width=170).print(each)
    print(f"equal bits: {equal_bits(report)}")


def draw(report: dict[str, Any], setting: Setting, path: Path) -> None:
    """Draw a panel for each rate, latency over that of resident experts, and one for the memory."""
    rates = next(iter(report.values()))["rates"]
    heights = [len(report) + 1] * len(rates) + [len(report) + len(PAPERS)]
    with chart(path, 1.4 + 0.42 * sum(heights)) as figure:
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        for axis, rate, (model, (cost, hidden, _)) in zip(axes, rates, PAPERS.items(), strict=False):
            bars = {f"paper, {model}": {"blocking": cost, "determinate": cost * (1 - hidden)}}
            for architecture, own in report.items():
                case = next(case for case in own["cases"] if case["rate_mb_s"] == rate)
                ways = case["ways"]
                bars[NAMES[architecture]] = {
                    way: ways[way]["latency_ms"] / ways[RESIDENT]["latency_ms"] - 1 for way in COLORS if way in ways
                }
            latency_bars(axis, bars, label=axis is axes[0])
            tokens = min(setting.tokens)
            title(axis, f"MoE block, {tokens} token(s), experts fetched at {rate / 1e3:.1f} GB/s")
        figure.legend(loc="outside upper center", ncols=len(COLORS))
        memory_bars(axes[-1], report)


def latency_bars(axis: Any, bars: dict[str, dict[str, float]], label: bool) -> None:
    for place, ways in enumerate(bars.values()):
        for i, (way, color) in enumerate(COLORS.items()):
            if way in ways:
                y = place + 0.27 * (i - 1)
                axis.barh(y, 100 * ways[way], 0.25, color=color, label=way if label and place == 1 else None)
                axis.text(100 * max(0, ways[way]), y, f" {100 * ways[way]:.0f}", va="center", fontsize=SMALL)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.set_xlabel("% longer than with resident experts")


def memory_bars(axis: Any, report: dict[str, Any]) -> None:
    """All weights on the device and the activations, as a share of that with resident experts."""
    shares = {f"paper, {model}": 1 - less for model, (_, _, less) in PAPERS.items()}
    for architecture, own in report.items():
        fixed, peaks = own["memory"]["fixed_mb"], own["memory"]["peak_mb"]
        shares[NAMES[architecture]] = (fixed + peaks["determinate"]) / (fixed + peaks[RESIDENT])
    colors = [PAPER if name.startswith("paper") else COLORS["determinate"] for name in shares]
    axis.barh(range(len(shares)), [100 * share for share in shares.values()], 0.6, color=colors)
    for place, share in enumerate(shares.values()):
        axis.text(100 * share, place, f" {100 * share:.0f}", va="center", fontsize=SMALL)
    axis.set_yticks(range(len(shares)), list(shares))
    axis.invert_yaxis()
    axis.set_xlabel("peak memory, % of that with resident experts")
    title(axis, "Memory: fixed weights, and experts or slots")
