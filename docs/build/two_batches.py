"""The page and the picture of two batches in flight, by the share of communication and by tokens.

They show the reports of `scmoe bench overlap` in docs/figures/two-batches, and that of the README.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.overlap_rows import Kind, OverlapRow, rows_of
from experiments.bench.speed_chart import KINDS, name_of, way_of_row
from experiments.bench.two_batches import architecture_of, batches_of
from scmoe.probes.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SMALL, chart, heading
from scmoe.report import Report

NAME = "two-batches"  # of the page, of its picture, and of the folder of its reports
COLORS = {"top2": GREEN, "shared_expert": PURPLE, "scmoe_pos2": BLUE, "scmoe_pos3": RED}
SHORTCUTS = ("scmoe_pos2", "scmoe_pos3")
OVER = {
    "over_best_without_another_model": "over top-2's best",
    "over_best_without_shortcut": "over the best without a shortcut",
}
TOKENS = 3072  # of a rank in the reports that are compared by their share
HIDDEN = "Standard top-2, all rows hidden"
SPEEDUPS = "Speed-ups over sequential top-2: training; inference."
OverlapReport = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Reports that differ in one quantity.

    quantity: its key in a report. label: of the picture's axis. title: of the table. column: the
    format of a column's name.
    """

    quantity: str
    label: str
    title: str
    column: str
    reports: list[OverlapReport]


def read_reports(figures: Path, headline: str) -> list[OverlapReport]:
    """Return the reports by their share of communication. figures: a folder. headline: the name of
    the report that the README shows."""
    paths = [*(figures / NAME).glob("*.json"), figures / f"{headline}.json"]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(reports, key=lambda report: report["comm_share"])


def groups_of(reports: Sequence[OverlapReport]) -> list[Group]:
    """Return the reports by their share of communication, and those of other numbers of tokens by
    these, if there are any."""
    by_share = Group(
        "comm_share",
        "share of communication",
        f"Iterations of {TOKENS:,} tokens a rank, by the share of communication. {SPEEDUPS}",
        "share {comm_share:.2f}, {layers} blocks",
        [report for report in reports if report["tokens"] == TOKENS],
    )
    by_tokens = Group(
        "tokens",
        "tokens a rank",
        f"Iterations of four blocks by the tokens of a rank, in sequences of 128. {SPEEDUPS}",
        "{tokens:,} tokens, share {comm_share:.2f}",
        sorted(
            (report for report in reports if report["tokens"] != TOKENS),
            key=lambda report: report["tokens"],
        ),
    )
    return [group for group in (by_share, by_tokens) if group.reports]


def tables(reports: Sequence[OverlapReport]) -> list[Report]:
    """Return a table for each group: a column for each report, and rows for architectures, for what
    the shortcut gains over other models, and for memory."""
    return [table_of(group) for group in groups_of(reports)]


def table_of(group: Group) -> Report:
    """Return the table of a group."""
    rows: dict[str, dict[str, str]] = {}
    columns = {}
    for i, report in enumerate(group.reports):
        columns[group.column.format_map(report)] = f"{{column{i}}}"
        for row, text in cells_of(report).items():
            rows.setdefault(row, {})[f"column{i}"] = text
    return Report(group.title, rows, columns, "architecture")


def cells_of(report: OverlapReport) -> dict[str, str]:
    """Return the texts of a report's column by row."""
    rows = rows_of(report)
    cells = {}
    for row, figures in rows.items():
        speedups = f"{figures.train_speedup:.2f}; {figures.forward_speedup:.2f}"
        cells[name_of(row) + way_of_row(row)] = speedups
    cells[HIDDEN] = f"{report['limit_train']:.2f}; {report['limit_forward']:.2f}"
    for row in (row for row in SHORTCUTS if row in rows):
        for comparison, words in OVER.items():
            gain = getattr(rows[row], comparison)
            medians = [gain[kind]["median"] for kind in ("train", "forward")]
            cells[f"{name_of(row)} {words}"] = "; ".join(f"{ratio:.2f}" for ratio in medians)
    for row, figures in rows.items():
        if figures.peak_over_one_batch is not None:
            label = f"memory of a step, {name_of(row)}, two batches over one"
            cells[label] = f"{figures.peak_over_one_batch:.2f}"
    return cells


def draw(reports: Sequence[OverlapReport], path: Path) -> None:
    """Draw speed-ups over the share of communication, and below over the tokens of a rank: a panel
    for inference and one for training."""
    groups = groups_of(reports)
    with chart(path, 1.3 + 2.8 * len(groups)) as figure:
        panels = figure.subplots(len(groups), len(KINDS), sharey="row", squeeze=False)
        for line, group in zip(panels, groups, strict=True):
            for axis, (kind, word) in zip(line, KINDS.items(), strict=True):
                draw_lines(axis, group, kind)
                axis.set(title=word, xlabel=group.label)
            line[0].set_ylabel("speed-up over\nsequential top-2")
        blocks = ", ".join(
            f"{report['layers']} blocks at {report['comm_share']:.2f}"
            for report in groups[0].reports
        )
        heading(figure, f"Two batches in flight and the shortcut: an iteration of {blocks}")
        lines, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower left", ncols=2, fontsize=SMALL)


def draw_lines(axis: Any, group: Group, kind: Kind) -> None:
    """Draw a line for each row, dashed with two batches in flight, and one for the limit."""
    values = [report[group.quantity] for report in group.reports]
    measured: list[Mapping[str, OverlapRow]] = [rows_of(report) for report in group.reports]
    for row in measured[0]:
        if row == "top2":  # what all others are compared with
            continue
        halves = batches_of(row) == 2
        axis.plot(
            values,
            [rows[row].speedup(kind) for rows in measured],
            color=COLORS[architecture_of(row)],
            linestyle="--" if halves else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if halves else None,
            label=name_of(row) + (", two batches" if halves else ""),
        )
    limits = [report[f"limit_{kind}"] for report in group.reports]
    axis.plot(values, limits, color=ORANGE, linewidth=2.5, label=HIDDEN)
    if group.quantity == "tokens":
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.grid()
