"""The page and the picture of two batches in flight, by the share of communication and by tokens.

They show the reports of `scmoe bench overlap` in docs/figures/two-batches, and that of the README.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench.row import Kind, rows_of, with_quartiles
from experiments.bench.speed_chart import KIND_WORDS
from scmoe.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SMALL, chart, heading
from scmoe.predict.row_names import architecture_of, batches_of, name_of, way_of_row
from scmoe.report import Report

BATCHES_PAGE = "two-batches"  # of the page, of its picture, and of the folder of its reports
ROW_COLORS = {"top2": GREEN, "shared_expert": PURPLE, "scmoe_pos2": BLUE, "scmoe_pos3": RED}
SHORTCUT_ROWS = ("scmoe_pos2", "scmoe_pos3")
OVER = {
    "over_best_without_another_model": "over top-2's best",
    "over_best_without_shortcut": "over the best without a shortcut",
}
COMPARED_TOKENS = 3072  # of a rank in the reports that are compared by their share
USUAL_BLOCKS = 4  # of most reports
ORDER: tuple[Kind, ...] = ("train", "forward")  # of panels and of the numbers in a cell
LIMITS = {  # in training a limit counts what a link must carry: gradients, and of top-2 two rows
    "top2": "Limit of Standard top-2",
    "scmoe_pos2": "Limit of ScMoE (Pos-2)",
}
SPEEDUPS = (
    "Speed-ups over sequential top-2: training; inference. In training a limit counts gradients and"
    " rows on the link; top-2 sends two rows a token."
)
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
    paths = [*(figures / BATCHES_PAGE).glob("*.json"), figures / f"{headline}.json"]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(reports, key=lambda report: report["comm_share"])


def groups_of(reports: Sequence[OverlapReport]) -> list[Group]:
    """Return the reports by their share of communication, and those of other numbers of tokens by
    these, if there are any."""
    by_share = Group(
        "comm_share",
        "share of communication",
        f"Iterations of {COMPARED_TOKENS:,} tokens a rank, by the share of communication."
        f" {SPEEDUPS}",
        "share {comm_share:.2f}, {layers} blocks",
        [report for report in reports if report["tokens"] == COMPARED_TOKENS],
    )
    by_tokens = Group(
        "tokens",
        "tokens a rank",
        "Iterations of four blocks by the tokens of a rank, in sequences of 128.",
        "{tokens:,} tokens, share {comm_share:.2f}",
        sorted(
            (report for report in reports if report["tokens"] != COMPARED_TOKENS),
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
    for row, words in LIMITS.items():
        limits = [limit(report, row, kind) for kind in ORDER]
        cells[words] = "; ".join(f"{value:.2f}" for value in limits)
    for row in (row for row in SHORTCUT_ROWS if row in rows):
        for comparison, words in OVER.items():
            gain = getattr(rows[row], comparison)
            texts = [
                with_quartiles(gain[kind]["median"], gain[kind]["quartiles"]) for kind in ORDER
            ]
            cells[f"{name_of(row)} {words}"] = "; ".join(texts)
    peaks = [row.peak_over_one_batch for row in rows.values()]
    if known := [peak for peak in peaks if peak is not None]:
        cells["memory, two batches over one"] = f"{min(known):.2f} to {max(known):.2f}"
    return cells


def limit(report: OverlapReport, row: str, kind: Kind) -> float:
    """Return the limit of a row's speed-up. In inference it is the same for all rows."""
    return report["limit_forward"] if kind == "forward" else report["rows"][row]["limit_train"]


def draw(reports: Sequence[OverlapReport], path: Path) -> None:
    """Draw speed-ups over the share of communication, and below over the tokens of a rank: a panel
    for training and one for inference."""
    groups = groups_of(reports)
    with chart(path, 1.3 + 2.8 * len(groups)) as figure:
        panels = figure.subplots(len(groups), len(ORDER), sharey="row", squeeze=False)
        for line, group in zip(panels, groups, strict=True):
            for axis, kind in zip(line, ORDER, strict=True):
                draw_group(axis, group, kind)
                axis.set(title=KIND_WORDS[kind], xlabel=group.label)
            line[0].set_ylabel("speed-up over\nsequential top-2")
        words = (
            "Two batches in flight and the shortcut: an iteration\n"
            "A limit hides all rows; in training it counts what the link must carry: gradients, and"
            " rows (two a token of top-2)"
        )
        heading(figure, words)
        lines, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower left", ncols=2, fontsize=SMALL)


def draw_group(axis: Any, group: Group, kind: Kind) -> None:
    """Draw a line for each row, dashed with two batches in flight, and the limits."""
    for row in rows_of(group.reports[0]):
        if row == "top2":  # what all others are compared with
            continue
        halves = batches_of(row) == 2
        draw_line(
            axis,
            group,
            partial(speedup, row=row, kind=kind),
            name_of(row) + (", two batches" if halves else ""),
            color=ROW_COLORS[architecture_of(row)],
            linestyle="--" if halves else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if halves else None,
        )
    for row, words in LIMITS.items():
        draw_line(
            axis,
            group,
            partial(limit, row=row, kind=kind),
            words,
            color=ORANGE,
            linestyle="-" if row == "top2" else ":",
            linewidth=2.5,
            marker="_",
            markersize=9,
            markeredgewidth=2.5,
        )
    values = [report[group.quantity] for report in group.reports]
    if group.quantity == "tokens":
        axis.set_xscale("log", base=2)
    axis.set_xticks(values, [tick(group, report) for report in group.reports])
    axis.grid()


def speedup(report: OverlapReport, row: str, kind: Kind) -> float:
    """Return a row's speed-up over sequential top-2."""
    return rows_of(report)[row].speedup(kind)


def draw_line(
    axis: Any, group: Group, value: Callable[[OverlapReport], float], label: str, **style: Any
) -> None:
    """Draw a value of the reports. Reports of another number of blocks are points off the line."""
    for report in group.reports:
        if report["layers"] != USUAL_BLOCKS:
            axis.plot(report[group.quantity], value(report), **style)
    joined = [report for report in group.reports if report["layers"] == USUAL_BLOCKS]
    places = [report[group.quantity] for report in joined]
    axis.plot(places, [value(report) for report in joined], label=label, **style)


def tick(group: Group, report: OverlapReport) -> str:
    """Return what stands below a report's place: the quantity, and a number of blocks that is not
    the usual one."""
    if group.quantity == "tokens":
        return f"{report['tokens']:,}"
    blocks = "" if report["layers"] == USUAL_BLOCKS else f"\n{report['layers']} blocks"
    return f"{report['comm_share']:.2f}{blocks}"
