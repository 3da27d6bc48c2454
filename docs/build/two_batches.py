"""The page and the picture of two batches in flight, by the share of communication.

They show the reports of `scmoe bench overlap` in docs/figures/two-batches, and that of the README.
"""

import json
from collections.abc import Mapping, Sequence
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
TITLE = (
    "Iterations of 3,072 tokens a rank, by the share of communication. Speed-ups over sequential"
    " top-2: training; inference."
)
OverlapReport = Mapping[str, Any]


def read_reports(figures: Path, headline: str) -> list[OverlapReport]:
    """Return the reports by their share of communication. figures: a folder. headline: the name of
    the report that the README shows."""
    paths = [*(figures / NAME).glob("*.json"), figures / f"{headline}.json"]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(reports, key=lambda report: report["comm_share"])


def tables(reports: Sequence[OverlapReport]) -> list[Report]:
    """Return one table: a column for each report, and rows for architectures, for what the shortcut
    gains over other models, and for memory."""
    rows: dict[str, dict[str, str]] = {}
    columns = {}
    for i, report in enumerate(reports):
        columns[f"share {report['comm_share']:.2f}, {report['layers']} blocks"] = f"{{column{i}}}"
        for row, text in cells_of(report).items():
            rows.setdefault(row, {})[f"column{i}"] = text
    return [Report(TITLE, rows, columns, "architecture")]


def cells_of(report: OverlapReport) -> dict[str, str]:
    """Return the texts of a report's column by row."""
    rows = rows_of(report)
    cells = {}
    for row, figures in rows.items():
        speedups = f"{figures.train_speedup:.2f}; {figures.forward_speedup:.2f}"
        cells[name_of(row) + way_of_row(row)] = speedups
    cells["all rows hidden"] = f"{report['limit_train']:.2f}; {report['limit_forward']:.2f}"
    for row in SHORTCUTS:
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
    """Draw speed-ups over the share of communication: a panel for inference and one for
    training."""
    with chart(path, 4.1) as figure:
        panels = figure.subplots(1, len(KINDS), sharey=True)
        for axis, (kind, word) in zip(panels, KINDS.items(), strict=True):
            draw_lines(axis, reports, kind)
            axis.set(title=word, xlabel="share of communication")
        panels[0].set_ylabel("speed-up over\nsequential top-2")
        blocks = ", ".join(f"{r['layers']} blocks at {r['comm_share']:.2f}" for r in reports)
        heading(figure, f"Two batches in flight and the shortcut: an iteration of {blocks}")
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower left", ncols=2, fontsize=SMALL)


def draw_lines(axis: Any, reports: Sequence[OverlapReport], kind: Kind) -> None:
    """Draw a line for each row, dashed with two batches in flight, and one for the limit."""
    shares = [report["comm_share"] for report in reports]
    measured: list[Mapping[str, OverlapRow]] = [rows_of(report) for report in reports]
    for row in measured[0]:
        if row == "top2":  # what all others are compared with
            continue
        halves = batches_of(row) == 2
        axis.plot(
            shares,
            [rows[row].speedup(kind) for rows in measured],
            color=COLORS[architecture_of(row)],
            linestyle="--" if halves else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if halves else None,
            label=name_of(row) + (", two batches" if halves else ""),
        )
    limits = [report[f"limit_{kind}"] for report in reports]
    axis.plot(shares, limits, color=ORANGE, linewidth=2.5, label="all rows hidden")
    axis.grid()
