"""Computes what uneven routing costs: the part of a report of `bench overlap --load` that compares
a load with the balanced one.

    over balanced   time of a row at its best schedule, over its time at the balanced load and the
                    schedule that is best there, in the same round
    straggler       what of it is computation of the busiest rank: T_free(load) / T_free(balanced) -
                    1

Speed-ups are over sequential top-2 at the same load, and hidden shares have T_sequential and T_free
at the same load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.overlap.rounds import Measurement, best_times, block_seconds
from experiments.bench.row import LoadFigures, Row, rows_of
from experiments.bench.setting import Setting
from experiments.bench.speed_chart import OVER_TOP2, cells_with_gain, line_colors
from scmoe.charts import chart, heading
from scmoe.loads import BALANCED, Sizes, imbalance, load_of
from scmoe.planning.clock import median, quartiles
from scmoe.predict.row_names import PIPELINED, batches_of, name_of, way_of_row
from scmoe.report import Report

# of a row's line, by batches in flight and whether it is pipelined
LINE_STYLES = {(1, False): "-o", (1, True): "--o", (2, False): "-.s", (2, True): ":s"}
APART = 0.006  # between rows at the same load, so that their quartiles do not cover each other


def imbalance_of_block(setting: Setting, load: str, block: str) -> dict[str, float]:
    """Return how uneven a load makes the routing of a block."""
    sizes = Sizes(setting.num_experts, setting.top_k_of(block), setting.ranks)
    return imbalance(load_of(load), sizes, setting.sequences, setting.seq_len)


def beside_balanced(measured: Measurement, balanced: Measurement, name: str, row: Row) -> Row:
    """Return the figures of a row at a load, with those beside the balanced one."""
    setting = measured.setting
    block = setting.block_of(name)
    uneven = best_times(measured.rows[name].finalists, measured.times)
    even = best_times(balanced.rows[name].finalists, measured.times)
    free, even_free = (
        block_seconds(measured, block, "free", load_name) for load_name in (measured.load, BALANCED)
    )
    figures = LoadFigures(
        over_balanced_forward=median(uneven.forward / even.forward),
        over_balanced_train=median(uneven.train / even.train),
        over_balanced_quartiles=quartiles(uneven.train / even.train),
        straggler_forward=median(free.forward / even_free.forward) - 1,
        straggler_train=median(free.train / even_free.train) - 1,
        dropped=measured.rows[name].dropped,
        **imbalance_of_block(setting, measured.load, block),
    )
    return replace(row, at_load=figures)


def tables(report: dict[str, Any]) -> list[Report]:
    columns = {
        "busiest rank, expert": "{max_over_mean_ranks:.2f}, {max_over_mean_experts:.2f}",
        "over balanced": "{over_balanced_forward:.2f}, {over_balanced_train:.2f}",
        "straggler": "{straggler_forward:.0%}, {straggler_train:.0%}",
        OVER_TOP2: "{over_top2}",
        "hidden": "{overlap_forward:.0%}, {overlap_backward:.0%}",
        "slot x chunks": "{place} x {chunks}",
        "auto / best": "{auto_over_best:.3f}",
    }
    of_layout = {"dropped": "{dropped:.1%}", "peak, MiB": "{peak_mb:.0f}"}
    of_ragged = {"most tokens of a rank": "{max_over_mean_tokens:.2f}"}
    reports = []
    for each in report["loads"]:
        shown = columns if each["layout"] == "dropless" else columns | of_layout
        if each["load"]["max_over_mean_tokens"] > 1:
            shown = of_ragged | shown
        reports.append(Report(load_conditions(each), cells_with_gain(each), shown))
    return reports


def load_conditions(report: dict[str, Any]) -> str:
    """Return the conditions of a load's report."""
    machine = (
        f"{report['compute']} compute, {report['ranks']} ranks, {report['level']},"
        f" {report['layout']}"
    )
    shares = f"{report['comm_share']:.2f}, {report['balanced_share']:.2f} at balance"
    return (
        f"`{report['load']['name']}`, communication share {shares}; {machine},"
        f" {report['rounds']} rounds. Forward, training (`hidden`: backward):"
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the time of a training step over the balanced one."""
    first = report["loads"][0]
    layers = first.get("layers", 2)
    is_pair = layers == 2 and first.get("every", 2) == 2
    what = "A pair" if is_pair else f"{layers} blocks"
    if first["level"] == "iteration":
        what = "An iteration"
    words = (
        f"{what}, {first['compute']} compute, {first['ranks']} ranks, share"
        f" {first['balanced_share']:.2f}"
    )
    names = {row: name_of(row, first.get("every", 2)) for row in first["rows"]}
    draw_lines(lines_of(report["loads"]), names, path, words, "training step over its balanced one")


class LoadPoint(NamedTuple):
    """A row at one load. busiest: the load of the busiest rank over the mean. over_balanced: the
    row's time over the balanced one, with quartiles."""

    busiest: float
    over_balanced: float
    quartiles: list[float]


def lines_of(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[LoadPoint]]:
    """Return a point of each row for each load."""
    lines: dict[str, list[LoadPoint]] = {}
    for report in reports:
        for name, row in rows_of(report).items():
            assert row.at_load is not None
            figures = row.at_load
            point = LoadPoint(
                # a ragged load gives ranks unequal tokens, and experts equal rows
                max(figures.max_over_mean_ranks, figures.max_over_mean_tokens),
                figures.over_balanced_train,
                figures.over_balanced_quartiles,
            )
            lines.setdefault(name, []).append(point)
    return lines


def draw_lines(
    lines: Mapping[str, Sequence[LoadPoint]],
    names: Mapping[str, str],
    path: Path,
    words: str,
    what: str,
) -> None:
    """Draw a time over its balanced one against the load of the busiest rank, a line for each row.

    names: of the rows. words: a title. what: the time, beside the axis.
    """
    colors = line_colors(lines)
    with chart(path, 3.9 + 0.12 * len(lines)) as figure:
        axis = figure.subplots()
        for i, row in enumerate(lines):
            points = sorted(lines[row])
            style = LINE_STYLES[batches_of(row), row.endswith(PIPELINED)]
            label = names[row] + way_of_row(row)
            loads = [point.busiest + APART * i for point in points]
            ratios = [point.over_balanced for point in points]
            axis.plot([1.0, *loads], [1.0, *ratios], style, color=colors[row], label=label)
            whiskers = zip(*(point.quartiles for point in points), strict=True)
            axis.vlines(loads, *whiskers, color=colors[row])
        axis.set(xlabel="load of the busiest rank over the mean", ylabel=what)
        axis.grid(axis="y")
        has_long_names = any(batches_of(row) == 2 for row in lines)
        figure.legend(loc="outside lower left", ncols=1 if has_long_names else 2)
        heading(figure, words)
