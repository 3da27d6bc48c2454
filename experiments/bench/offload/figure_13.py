"""The report of `figure 13`: tables and a chart of offloaded experts, beside the paper's values."""

import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.bench.offload.cases import RESIDENT, Offloading
from experiments.bench.offload.ways import measure
from experiments.bench.other_settings import OFFLOADED, OffloadSetting
from experiments.bench.row import from_json, to_json
from experiments.engine.bars import Bar, bar_legend, bars_height, grouped_bars
from experiments.engine.isolated import follow_caller
from scmoe.charts import BLUE, PAPER, RED, SKY, chart, heading, title
from scmoe.config.installation import require
from scmoe.predict.row_names import name_of
from scmoe.report import Report, publish, say

# Blocking's extra latency over an MoE block's; the share of it that migration hides; the share of
# peak memory saved
PAPER_MODELS = {"GPT2-MoE-Medium": (0.8, 0.75, 0.5), "GPT3-MoE-XL": (2.4, 0.25, 0.6)}
WAY_COLORS = {"blocking": RED, "determinate": BLUE, "speculative": SKY}


def bench_offload(out: Path, setting: OffloadSetting) -> dict[str, Any]:
    """Measure every architecture, print tables, write chart and figures into `out`; return the rows
    of one token."""
    require("figure 13", "matplotlib")
    report: dict[str, Offloading] = {}
    rates = None
    for architecture in sorted(setting.architectures, key=OFFLOADED.index):
        say(f"measuring {name_of(architecture)}")
        ends = (partial(signal.raise_signal, signal.SIGKILL),)
        with ProcessPoolExecutor(1, get_context("spawn"), follow_caller, ends) as alone:
            report[architecture] = alone.submit(measure, setting, architecture, rates).result()
        rates = report[architecture].rates
    equal_bits = all(case.equal_bits for measured in report.values() for case in measured.cases)
    summary = {"rows": first_case_figures(report), "equal_bits": equal_bits}
    figure = {**summary, "setting": asdict(setting), "architectures": to_json(report)}
    publish(figure, tables(figure), draw, out / "figure-13")
    say(f"equal bits: {equal_bits}")
    return summary


def first_case_figures(report: Mapping[str, Offloading]) -> dict[str, Any]:
    """Return {architecture: {way: figures}} of the first case, which has the fewest tokens and the
    lowest cost."""
    return {
        architecture: {
            way: {
                **to_json(figures),
                "peak_mb": measured.memory.peak_mb[way],
                "tokens": measured.cases[0].tokens,
                "rate_mb_s": measured.cases[0].rate_mb_s,
            }
            for way, figures in measured.cases[0].ways.items()
        }
        for architecture, measured in report.items()
    }


def read_architectures(figure: Mapping[str, Any]) -> dict[str, Offloading]:
    """Return the architectures of a report that was read from JSON."""
    return {name: from_json(Offloading, each) for name, each in figure["architectures"].items()}


def tables(figure: dict[str, Any]) -> list[Report]:
    """Return the table of latencies and that of memory."""
    architectures = read_architectures(figure)
    memory = {name: asdict(measured.memory) for name, measured in architectures.items()}
    latencies = {
        f"{name}, {case.tokens}, {case.rate_mb_s:,.0f}": to_json(case)
        for name, measured in architectures.items()
        for case in measured.cases
        if case.kept
    }
    columns = {
        **{f"{way}, ms": f"{{ways[{way}][latency_ms]:.1f}}" for way in (RESIDENT, *WAY_COLORS)},
        "determinate takes away": "{ways[determinate][hidden]:.0%}",
        "limit": "{ways[determinate][bound]:.0%}",
        "speculative": "{ways[speculative][hidden]:.0%}",
        "hit rate": "{ways[speculative][hit_rate]:.0%}",
        "kept/tried": "{kept}/{tried}",
    }
    peaks = {way: f"{{peak_mb[{way}]:.0f}}" for way in (RESIDENT, "determinate")}
    title = (
        "Latency of the MoE block, width {dim}, {ffn_dim} in an expert, {num_experts} experts,"
        " {pairs} MoE layers, one thread; medians of the times during which the process waited for"
        " a core for at most {max_wait:.0%}; rows without such times are left out:"
    ).format_map(figure["setting"])
    return [
        Report(title, latencies, columns, "row, tokens, MB/s"),
        Report(
            "Peak memory beyond the fixed weights, MB:",
            memory,
            {"fixed weights": "{fixed_mb:.0f}", **peaks},
        ),
    ]


def draw(figure: dict[str, Any], path: Path) -> None:
    """Draw a panel for each rate, latency over that of resident experts, and one for the memory."""
    report = read_architectures(figure)
    tokens = min(figure["setting"]["tokens"])
    rates = next(iter(report.values())).rates
    panels = {}
    for rate, model in zip(rates, PAPER_MODELS, strict=False):
        words = (
            f"MoE block, {tokens} token{'s' if tokens > 1 else ''}, experts fetched at"
            f" {rate / 1e3:.1f} GB/s"
        )
        panels[f"{words}:\n% longer than with resident experts"] = latency_bars(report, rate, model)
    panels["Peak memory, fixed weights and experts or slots:\n% of that with resident experts"] = (
        memory_bars(report)
    )
    heights = [bars_height(groups) for groups in panels.values()]
    with chart(path, 0.9 + 0.8 * len(panels) + sum(heights)) as drawing:
        axes = drawing.subplots(len(heights), 1, height_ratios=heights)
        for axis, (words, groups) in zip(axes, panels.items(), strict=True):
            grouped_bars(axis, groups, room=0.22)
            title(axis, words)
        heading(drawing, "Fig. 13: experts fetched while the backbone runs, on one CPU")
        bar_legend(drawing, WAY_COLORS | {"paper (its machine)": PAPER})


def latency_bars(report: Mapping[str, Offloading], rate: float, model: str) -> dict[str, list[Bar]]:
    """Return how much longer a block takes at this rate, in %, and the paper's model for which the
    rate stands."""
    cost, hidden, _ = PAPER_MODELS[model]
    printed = {"blocking": cost, "determinate": cost * (1 - hidden)}
    groups = {model: [percent(share, PAPER, f" {way}") for way, share in printed.items()]}
    for architecture, measured in report.items():
        case = next(case for case in measured.cases if case.rate_mb_s == rate)
        if not case.ways:  # no time was kept
            continue
        resident_ms = case.ways[RESIDENT].latency_ms
        groups[name_of(architecture)] = [
            percent(case.ways[way].latency_ms / resident_ms - 1, color)
            for way, color in WAY_COLORS.items()
        ]
    return groups


def memory_bars(report: Mapping[str, Offloading]) -> dict[str, list[Bar]]:
    """Return all weights on the device and the activations, as a share of that with resident
    experts."""
    groups = {model: [percent(1 - less, PAPER)] for model, (_, _, less) in PAPER_MODELS.items()}
    for architecture, measured in report.items():
        fixed_mb = measured.memory.fixed_mb
        peak_mb = measured.memory.peak_mb
        share = (fixed_mb + peak_mb["determinate"]) / (fixed_mb + peak_mb[RESIDENT])
        groups[name_of(architecture)] = [percent(share, WAY_COLORS["determinate"])]
    return groups


def percent(share: float, color: str, words: str = "") -> Bar:
    """Return a bar of a share, with its percents and words at its end."""
    return Bar(100 * share, color, f"{100 * share:.0f}{words}")
