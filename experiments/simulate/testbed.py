"""`scmoe simulate testbed`: reports of `bench overlap`, predicted from others or from the times of
their own top-2 (testbed_cells.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.simulate.reports import read_reports
from experiments.simulate.testbed_cells import Cell, all_cells
from experiments.simulate.testbed_checks import CHECKS, Bound, Check
from scmoe.report import Report, say


def summary_of(check: Check, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return the errors of a check by quantity: of the rows that count, of all rows but sequential
    top-2, and of the two null predictors in the rows that count."""
    return {
        quantity: errors_of(check.bounds.get(quantity), cells, quantity)
        for quantity in dict.fromkeys(cell.figure.quantity for cell in cells if cell.has_goal)
    }


def errors_of(bound: Bound | None, cells: Sequence[Cell], quantity: str) -> dict[str, Any]:
    """Return the errors of a quantity. bound: None: no goal is set."""
    of_quantity = [cell for cell in cells if cell.figure.quantity == quantity]
    figures = [cell.figure for cell in of_quantity if cell.has_goal]
    errors = [abs(figure.error) for figure in figures]
    all_rows = [abs(cell.figure.error) for cell in of_quantity if cell.row != "top2"] or errors
    line: dict[str, Any] = {
        "cells": len(errors),
        "mean": sum(errors) / len(errors),
        "worst": max(errors),
        "all_rows_mean": sum(all_rows) / len(all_rows),
        "all_rows_worst": max(all_rows),
        "nulls": [max(abs(figure.nulls[index]) for figure in figures) for index in (0, 1)],
    }
    if bound is not None:
        line["goal"] = bound.worst
        line["goal_of_mean"] = bound.mean
        mean_is_met = bound.mean is None or line["mean"] <= bound.mean
        line["met"] = line["worst"] <= bound.worst and mean_is_met
    return line


def tables_of(check: Check, cells: Sequence[Cell]) -> list[Report]:
    """Return a table for each report at each load."""
    columns = {
        "measured": "{measured:.4g}",
        "predicted": "{predicted:.4g}",
        "error": "{error:+.1%}",
        "null 1": "{nulls[0]:+.1%}",
        "null 2": "{nulls[1]:+.1%}",
    }
    rows = dict[str, dict[str, dict[str, Any]]]()
    for cell in cells:
        source = "its own top-2" if cell.calibrated_on == cell.report else cell.calibrated_on
        title = f"{check.name}: {cell.report}"
        if cell.load is not None:
            title += f" at {cell.load}"
        title += f", calibrated on {source}"
        if cell.assumed:
            title += f" (assumed: {'; '.join(cell.assumed)})"
        name = f"{cell.row}, {cell.figure.quantity}"
        rows.setdefault(title, {})[name] = cell.to_json()
    return [Report(title, of_report, columns) for title, of_report in rows.items()]


ERRORS = {
    "cells": "{cells}",
    "mean": "{mean:.1%}",
    "worst": "{worst:.1%}",
    "goal": "{goal:.0%}",
    "goal of the mean": "{goal_of_mean:.0%}",
    "met": "{met}",
    "all rows: mean": "{all_rows_mean:.1%}",
    "worst of all rows": "{all_rows_worst:.1%}",
    "null 1": "{nulls[0]:.1%}",
    "null 2": "{nulls[1]:.1%}",
}


def show(check: Check, cells: Sequence[Cell], summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the tables of a check, and its errors or the commands that measure it."""
    for table in tables_of(check, cells):
        table.show()
    if cells:
        Report(f"{check.name}: rows in one chunk", summary, ERRORS, first="quantity").show()
        return
    say(f"{check.name}: not measured yet. Run")
    for command in check.commands:
        say(f"    {command}")


def simulate_testbed(folder: Path) -> dict[str, Any]:
    """Print all checks on standard error and return the report.

    folder: of reports of `bench overlap`, which may lie in folders below it.
    """
    reports = read_reports(folder)
    for report in reports:
        if report.refused:
            say(
                f"{report.name} calibrates nothing: top-2's operators take longer than its blocks"
                " with free links. Measure it again, with other work stopped."
            )
    cells = all_cells(reports)
    summaries = {check.name: summary_of(check, cells[check.name]) for check in CHECKS}
    for check in CHECKS:
        show(check, cells[check.name], summaries[check.name])
    say(
        "null 1: the row of the calibrating report again, or no gain; null 2: all transfers are"
        " hidden"
    )
    return {
        "cells": [
            {"check": name, **cell.to_json()} for name, each in cells.items() for cell in each
        ],
        "checks": summaries,
        "max_error_unseen": figure_by_check(summaries, "worst"),
        "null_errors": figure_by_check(summaries, "nulls"),
        "not_measured": {check.name: check.commands for check in CHECKS if not cells[check.name]},
    }


def figure_by_check(
    summaries: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str
) -> dict[str, dict[str, Any]]:
    """Return one figure of each check and quantity."""
    return {
        check: {quantity: line[name] for quantity, line in lines.items()}
        for check, lines in summaries.items()
    }
