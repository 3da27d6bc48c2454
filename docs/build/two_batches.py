"""The page and the picture of two batches in flight: where they pay, where the shortcut does, and
where both together do.

The reports of `scmoe bench overlap` in docs/figures/two-batches, and the one of the README, are
ordered by the share of communication, by the tokens of a rank, and by the load. One more report
needs no entry here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.overlap_rows import Kind, OverlapRow, rows_of
from experiments.bench.speed_chart import KINDS, name_of, way_of_row
from experiments.bench.two_batches import batches_of
from scmoe.probes.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SMALL, chart, heading
from scmoe.report import Report

NAME = "two-batches"  # of the page, of its picture, and of the folder of its reports
FOLDER = Path("docs/figures") / NAME
EIGHT_BLOCKS = Path("docs/figures/overlap-real-iteration-2-ranks-share-0.52-layers-8.json")
COLORS = {"top2": GREEN, "shared_expert": PURPLE, "scmoe_pos2": BLUE, "scmoe_pos3": RED}
SHORTCUTS = ("scmoe_pos2", "scmoe_pos3")
OVER = {
    "over_best_without_another_model": "over top-2's best",
    "over_best_without_shortcut": "over the best without a shortcut",
}


class Column(NamedTuple):
    """A setting that was measured. value: the share or the tokens. limit: the speed-up with all
    rows hidden, for inference and training."""

    label: str
    value: float
    rows: Mapping[str, OverlapRow]
    limit: Mapping[Kind, float]


Columns = Sequence[Column]


def read_reports() -> list[dict[str, Any]]:
    """Return all reports of the folder, and that of eight blocks."""
    paths = [*sorted(FOLDER.glob("*.json")), EIGHT_BLOCKS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def tables(reports: Sequence[dict[str, Any]]) -> list[Report]:
    """Return a table for each question that has reports."""
    by_share = columns_by_share(reports)
    questions = {
        "Iterations of 3,072 tokens a rank, by the share of communication": by_share,
        "Iterations of four blocks at a share of about 0.52, by the tokens of a rank in sequences"
        " of 128": columns_by_tokens(reports),
        "Two pairs of emulated blocks, dropless, by the load of the busiest rank": columns_by_load(
            reports
        ),
        "Other iterations": other_columns(reports),
    }
    how = "Speed-ups over sequential top-2 at the same load: training; inference."
    return [table_of(f"{title}. {how}", columns) for title, columns in questions.items() if columns]


def columns_by_share(reports: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the iterations whose tokens were found for a ratio of rows to gradients, on 2
    ranks."""
    columns = [
        column_of(
            report,
            f"share {report['comm_share']:.2f}, {report['layers']} blocks",
            report["comm_share"],
        )
        for report in reports
        if is_iteration(report) and report["ranks"] == 2 and report["wanted_ratio"] is not None
    ]
    return sorted(columns, key=lambda column: column.value)


def columns_by_tokens(reports: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the iterations whose tokens were given."""
    columns = [
        column_of(report, f"{report['tokens']:,} tokens", report["tokens"])
        for report in reports
        if is_iteration(report) and report["wanted_ratio"] is None
    ]
    return sorted(columns, key=lambda column: column.value)


def columns_by_load(reports: Sequence[dict[str, Any]]) -> list[Column]:
    """Return each load of the reports of uneven routing."""
    return [
        column_of(load, load["load"]["name"], position)
        for report in reports
        for position, load in enumerate(report.get("loads", ()))
    ]


def other_columns(reports: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the iterations of more ranks."""
    return [
        column_of(report, f"{report['ranks']} ranks, {report['compute']}", report["ranks"])
        for report in reports
        if is_iteration(report) and report["ranks"] != 2
    ]


def is_iteration(report: Mapping[str, Any]) -> bool:
    """Return whether a report is of balanced iterations."""
    return report.get("level") == "iteration"


def column_of(report: dict[str, Any], label: str, value: float) -> Column:
    """Return a report as a column."""
    limit: dict[Kind, float] = {kind: report[f"limit_{kind}"] for kind in KINDS}
    return Column(label, value, rows_of(report), limit)


def table_of(title: str, columns: Columns) -> Report:
    """Return a table with a column for each setting, and rows for architectures, for what the
    shortcut gains over other models, and for memory."""
    rows: dict[str, dict[str, str]] = {}
    for i, column in enumerate(columns):
        for row, text in cells_of(column).items():
            rows.setdefault(row, {})[f"column{i}"] = text
    return Report(
        title,
        rows,
        {column.label: f"{{column{i}}}" for i, column in enumerate(columns)},
        "architecture",
    )


def cells_of(column: Column) -> dict[str, str]:
    """Return the texts of a column by row."""
    cells = {}
    for row, figures in column.rows.items():
        label = name_of(row) + way_of_row(row)
        cells[label] = f"{figures.train_speedup:.2f}; {figures.forward_speedup:.2f}"
    cells["all rows hidden"] = f"{column.limit['train']:.2f}; {column.limit['forward']:.2f}"
    for row in SHORTCUTS:
        for comparison, words in OVER.items():
            gain = getattr(column.rows.get(row), comparison, None)
            if gain is not None:
                medians = [gain[kind]["median"] for kind in ("train", "forward")]
                cells[f"{name_of(row)} {words}"] = "; ".join(f"{ratio:.2f}" for ratio in medians)
    for row, figures in column.rows.items():
        if figures.peak_over_one_batch is not None and row in ("top2_two", "scmoe_pos2_two"):
            label = f"memory of a step, {name_of(row)}, two batches over one"
            cells[label] = f"{figures.peak_over_one_batch:.2f}"
    return cells


def draw(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw speed-ups over the share of communication and over the tokens of a rank: a panel each
    for inference and training."""
    questions = {
        "share of communication": columns_by_share(reports),
        "tokens of a rank": columns_by_tokens(reports),
    }
    questions = {label: columns for label, columns in questions.items() if columns}
    with chart(path, 2.4 * len(questions) + 1.7) as figure:
        panels = figure.subplots(len(questions), len(KINDS), sharey="row", squeeze=False)
        for axes, (label, columns) in zip(panels, questions.items(), strict=True):
            for axis, (kind, word) in zip(axes, KINDS.items(), strict=True):
                draw_lines(axis, columns, kind)
                axis.set(title=word, xlabel=label)
                if label.startswith("tokens"):
                    axis.set_xscale("log", base=2)
                    ticks = [column.value for column in columns]
                    axis.set_xticks(ticks, [f"{tokens:,.0f}" for tokens in ticks], rotation=45)
            axes[0].set_ylabel("speed-up over\nsequential top-2")
        heading(figure, "Two batches in flight and the shortcut: an iteration")
        lines, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower left", ncols=2, fontsize=SMALL)


def draw_lines(axis: Any, columns: Columns, kind: Kind) -> None:
    """Draw a line for each architecture, dashed with two batches in flight."""
    rows = list(dict.fromkeys(row for column in columns for row in column.rows if row != "top2"))
    for row in rows:
        measured = [column for column in columns if row in column.rows]
        halves = batches_of(row) == 2
        axis.plot(
            [column.value for column in measured],
            [column.rows[row].speedup(kind) for column in measured],
            color=COLORS[row.removesuffix("_two")],
            linestyle="--" if halves else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if halves else None,
            label=name_of(row) + (", two batches" if halves else ""),
        )
    values = [column.value for column in columns]
    limits = [column.limit[kind] for column in columns]
    axis.plot(values, limits, color=ORANGE, linewidth=2.5, label="all rows hidden")
    axis.grid()
