"""`scmoe simulate testbed`: reports of `bench overlap`, predicted from others or from the times of
their own top-2.

    other share    the report with the larger share calibrates; the rate of the links is stated
    own top-2      the operators of sequential top-2 in the same report; rows, schedules, gradients
                   and halves are predicted
    load           a balanced calibration: the report's own, or that of another report
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.overlap_rows import OverlapRow
from experiments.bench.two_batches import batches_of
from experiments.simulate.reports import Calibration, Measured, read_reports
from experiments.simulate.rows import Predicted, predict_row, predict_sequential
from scmoe.report import Report, say

SHARES_APART = 0.05  # two shares
ITERATION = (
    "overlap --compute real --level iteration --rows top2 shared_expert scmoe_pos2 scmoe_pos3"
)
LOAD_ROWS = "--rows top2 shared_expert scmoe_pos2 scmoe_pos2_pipelined scmoe_pos3"
TWO_ROWS = "--rows top2 shared_expert scmoe_pos2 top2_two shared_expert_two scmoe_pos2_two"
OUT = "--out docs/figures/testbed"


class Bound(NamedTuple):
    """The goal of a check: the worst error of its cells, and their mean."""

    worst: float
    mean: float | None = None


@dataclass(frozen=True)
class Check:
    """A question to the simulator. quantities: those that a goal is set for. commands: the benches
    whose reports answer it."""

    name: str
    bounds: dict[str, Bound]
    commands: tuple[str, ...]


EMULATED_SHARE = Check(
    "emulated pair, other share",
    {"forward": Bound(0.05), "train": Bound(0.05)},
    ("overlap --share 0.52", "overlap --share 0.35"),
)
REAL_SHARE = Check(
    "real pair, other share",
    {"forward": Bound(0.10, 0.04), "train": Bound(0.10, 0.04)},
    ("overlap --share 0.52 --compute real", "overlap --share 0.15 --compute real --rounds 15"),
)
ITERATION_SHARE = Check(
    "iteration, other share",
    {"train": Bound(0.08), "step": Bound(0.12)},
    (f"{ITERATION} --share 0.52", f"{ITERATION} --share 0.35"),
)
ITERATION_RATIO = Check(
    "iteration, rows over gradients",
    {"train": Bound(0.08), "step": Bound(0.12)},
    (
        f"{ITERATION} --share 0.52 --rows-per-gradient 1",
        f"{ITERATION} --share 0.52 --rows-per-gradient 0.3 --seq-len 64",
    ),
)
LOAD = Check(
    "pair under load",
    {"forward": Bound(0.08), "train": Bound(0.08), "over balanced": Bound(0.08)},
    (f"overlap --share 0.52 --load hot_rank:1.7 {LOAD_ROWS}",),
)
TWO_BATCHES = Check(
    "two batches in flight",
    {"forward": Bound(0.08), "train": Bound(0.08)},
    (f"overlap --share 0.52 --layers 4 {TWO_ROWS}",),
)
CHECKS = (EMULATED_SHARE, REAL_SHARE, ITERATION_SHARE, ITERATION_RATIO, LOAD, TWO_BATCHES)


@dataclass(frozen=True)
class Cell:
    """A measured number and its prediction. quantity: forward, train (speed-ups over sequential
    top-2), step (milliseconds), over balanced (times). again: what the calibrating report says of
    the row itself, or 1. hidden: the prediction if all transfers of rows and sums were hidden. In
    the unit of `measured`."""

    check: str
    report: str
    calibrated_on: str
    row: str
    quantity: str
    measured: float
    predicted: float
    again: float | None
    hidden: float | None
    assumed: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def in_one_chunk(self) -> bool:
        return not self.row.endswith("_pipelined")

    @property
    def counts(self) -> bool:
        """Whether a goal is set for it. Sequential top-2 is what rows are compared with, so its
        speed-up shows the noise of a measurement; its step is predicted like any other."""
        return self.in_one_chunk and (self.row != "top2" or self.quantity in ("step", LABEL_LOAD))

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "report": self.report,
            "calibrated_on": self.calibrated_on,
            "row": self.row,
            "quantity": self.quantity,
            "measured": self.measured,
            "predicted": self.predicted,
            "error": self.error,
            "nulls": [off(self.again, self.measured), off(self.hidden, self.measured)],
            "assumed": list(self.assumed),
        }


LABEL_LOAD = "over balanced"


def off(predicted: float | None, measured: float) -> float | None:
    """Return the relative error."""
    return None if predicted is None else predicted / measured - 1


def cells_of_report(
    check: Check, report: Measured, calibration: Calibration, source: Measured, rows: Sequence[str]
) -> Iterator[Cell]:
    """Yield the cells of a report's rows. source: the report of the calibration."""
    calibration = calibration.with_rate(report.link_mbit)
    sequential = predict_sequential(calibration, report.load)
    for name in rows:
        row = report.rows[name]
        inside = row.inside_gain is not None
        predicted = predict_row(calibration, name, inside, report.load)
        known = source.rows.get(name) if source is not report else None

        def cell(
            quantity: str,
            measured: float,
            value: float,
            again: float | None,
            hidden: float | None,
            row: str = name,
        ) -> Cell:
            return Cell(
                check.name,
                report.name if report.load is None else f"{report.name}: {report.load}",
                source.name,
                row,
                quantity,
                measured,
                value,
                again,
                hidden,
                calibration.assumed,
            )

        yield from speedups(row, known, sequential, predicted, cell)
        if report.setting.level == "iteration":
            again = known.train_ms if known else report.rows["top2"].train_ms
            yield cell(
                "step", row.train_ms, 1e3 * predicted.train, again, 1e3 * predicted.free_train
            )
        if row.at_load is not None:
            even = predict_row(calibration, name, inside, None)
            yield cell(
                LABEL_LOAD,
                row.at_load.over_balanced_train,
                predicted.train / even.train,
                1.0,
                predicted.free_train / even.free_train,
            )


def speedups(
    row: OverlapRow,
    known: OverlapRow | None,
    sequential: Predicted,
    predicted: Predicted,
    cell: Callable[..., Cell],
) -> Iterator[Cell]:
    """Yield a row's speed-ups over sequential top-2. known: the row in the calibrating report."""
    yield cell(
        "forward",
        row.forward_speedup,
        sequential.forward / predicted.forward,
        known.forward_speedup if known else 1.0,
        sequential.forward / predicted.free_forward,
    )
    yield cell(
        "train",
        row.train_speedup,
        sequential.train / predicted.train,
        known.train_speedup if known else 1.0,
        sequential.train / predicted.free_train,
    )


def other_shares(check: Check, reports: Sequence[Measured]) -> Iterator[Cell]:
    """Yield the cells of all reports whose setting another one has at a larger share, calibrated on
    the largest."""
    balanced = [report for report in reports if report.load is None]
    for report in balanced:
        alike = [other for other in balanced if report.same_setting(other)]
        source = max(alike, key=lambda other: other.comm_share)
        if source.calibration and source.comm_share > report.comm_share + SHARES_APART:
            rows = [name for name in report.rows if batches_of(name) == 1]
            yield from cells_of_report(check, report, source.calibration, source, rows)


def with_level(
    reports: Sequence[Measured], level: str, compute: str | None = None
) -> list[Measured]:
    return [
        report
        for report in reports
        if report.setting.level == level and compute in (None, report.setting.compute)
    ]


def ratios(check: Check, reports: Sequence[Measured]) -> Iterator[Cell]:
    """Yield the cells of iterations, each calibrated on its own top-2."""
    for report in with_level(reports, "iteration"):
        if report.load is None and report.calibration:
            rows = [name for name in report.rows if batches_of(name) == 1]
            yield from cells_of_report(check, report, report.calibration, report, rows)


def under_load(check: Check, reports: Sequence[Measured]) -> Iterator[Cell]:
    """Yield the cells of pairs with a hot rank. A report that states no balanced calibration is
    calibrated on the balanced one of its setting with the nearest share."""
    pairs = with_level(reports, "block")
    for report in pairs:
        if report.load is None or not report.load.startswith("hot_rank"):
            continue
        source = report
        if report.calibration is None:
            alike = [
                other
                for other in pairs
                if other.load is None and other.calibration and report.same_setting(other)
            ]
            if not alike:
                continue
            source = min(alike, key=lambda other: abs(other.link_mbit - report.link_mbit))
        assert source.calibration is not None
        rows = [name for name in report.rows if batches_of(name) == 1]
        for cell in cells_of_report(check, report, source.calibration, source, rows):
            yield replace(cell, again=1.0)


def halves(check: Check, reports: Sequence[Measured]) -> Iterator[Cell]:
    """Yield the cells of rows with two batches in flight, calibrated on their report's top-2."""
    for report in reports:
        if report.load is None and report.calibration:
            rows = [name for name in report.rows if batches_of(name) == 2]
            yield from cells_of_report(check, report, report.calibration, report, rows)


def all_cells(reports: Sequence[Measured]) -> dict[str, list[Cell]]:
    """Return the cells of each check."""
    return {
        EMULATED_SHARE.name: [
            *other_shares(EMULATED_SHARE, with_level(reports, "block", "emulated"))
        ],
        REAL_SHARE.name: [*other_shares(REAL_SHARE, with_level(reports, "block", "real"))],
        ITERATION_SHARE.name: [*other_shares(ITERATION_SHARE, with_level(reports, "iteration"))],
        ITERATION_RATIO.name: [*ratios(ITERATION_RATIO, reports)],
        LOAD.name: [*under_load(LOAD, reports)],
        TWO_BATCHES.name: [*halves(TWO_BATCHES, reports)],
    }


def mean_and_worst(errors: Sequence[float]) -> tuple[float, float] | None:
    """Return the mean and the largest absolute error; None: there is none."""
    sizes = [abs(error) for error in errors]
    return (sum(sizes) / len(sizes), max(sizes)) if sizes else None


def summary_of(check: Check, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return the errors of a check by quantity: of the rows in one chunk, of all rows, and of the
    null predictors in the rows in one chunk."""
    lines = {}
    for quantity in dict.fromkeys(cell.quantity for cell in cells):
        own = [cell for cell in cells if cell.quantity == quantity]
        counting = [cell for cell in own if cell.counts]
        errors = mean_and_worst([cell.error for cell in counting])
        if errors is None:
            continue
        bound = check.bounds.get(quantity)
        line = {
            "cells": len(counting),
            "mean": errors[0],
            "worst": errors[1],
            "all_rows": mean_and_worst([c.error for c in own if c.row != "top2"]),
            "nulls": [
                worst_of([off(c.again, c.measured) for c in counting]),
                worst_of([off(c.hidden, c.measured) for c in counting]),
            ],
        }
        if bound is not None:
            line["bound"] = bound.worst
            line["bound_mean"] = bound.mean
            in_mean = bound.mean is None or errors[0] <= bound.mean
            line["met"] = errors[1] <= bound.worst and in_mean
        lines[quantity] = line
    return lines


def worst_of(errors: Sequence[float | None]) -> float | None:
    return max((abs(error) for error in errors if error is not None), default=None)


def show(check: Check, cells: Sequence[Cell], summary: dict[str, dict[str, Any]]) -> None:
    """Print a table for each report and one of the errors."""
    columns = {
        "measured": "{measured:.4g}",
        "predicted": "{predicted:.4g}",
        "error": "{error:+.1%}",
        "null 1": "{first_null:+.1%}",
        "null 2": "{second_null:+.1%}",
    }
    by_report = dict[str, list[Cell]]()
    for cell in cells:
        by_report.setdefault(cell.report, []).append(cell)
    for name, own in by_report.items():
        rows = {}
        for cell in own:
            line = cell.to_json()
            line["first_null"], line["second_null"] = line["nulls"]
            rows[f"{cell.row}, {cell.quantity}"] = line
        first = own[0]
        source = "its own top-2" if first.calibrated_on in name else first.calibrated_on
        title = f"{check.name}: {name}, calibrated on {source}"
        if first.assumed:
            title += f" (assumed: {'; '.join(first.assumed)})"
        Report(title, rows, columns, first="row").show()

    if not cells:
        say(f"{check.name}: not measured yet. Run")
        for command in check.commands:
            say(f"    scmoe bench {command} {OUT}")
        return
    errors = {
        "cells": "{cells}",
        "mean": "{mean:.1%}",
        "worst": "{worst:.1%}",
        "goal": "{bound:.0%}",
        "goal of the mean": "{bound_mean:.0%}",
        "met": "{met}",
        "all rows: mean": "{all_rows[0]:.1%}",
        "worst of all rows": "{all_rows[1]:.1%}",
        "null 1": "{nulls[0]:.1%}",
        "null 2": "{nulls[1]:.1%}",
    }
    Report(f"{check.name}: rows in one chunk", summary, errors, first="quantity").show()


def simulate_testbed(folder: Path) -> dict[str, Any]:
    """Print all checks on standard error and return the report."""
    reports = read_reports(folder)
    for report in reports:
        if report.refused:
            say(
                f"{report.name} calibrates nothing: top-2's operators take longer than its blocks"
                " with free links. Measure it again, with other work stopped."
            )
    cells = all_cells(reports)
    summaries = {}
    for check in CHECKS:
        summaries[check.name] = summary_of(check, cells[check.name])
        show(check, cells[check.name], summaries[check.name])
    say(
        "null 1: the row of the calibrating report again, or no gain; null 2: all transfers are"
        " hidden"
    )
    return {
        "cells": [cell.to_json() for own in cells.values() for cell in own],
        "checks": summaries,
        "max_error_unseen": {
            name: {quantity: line["worst"] for quantity, line in lines.items()}
            for name, lines in summaries.items()
        },
        "null_errors": {
            name: {quantity: line["nulls"] for quantity, line in lines.items()}
            for name, lines in summaries.items()
        },
        "not_measured": {
            check.name: [f"scmoe bench {command} {OUT}" for command in check.commands]
            for check in CHECKS
            if not cells[check.name]
        },
    }
