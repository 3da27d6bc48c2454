"""The numbers of testbed reports beside their predictions, and which report calibrates which.

other share    the report with the largest share calibrates; the rate of the links is stated
own top-2      the operators of sequential top-2 in the same report; rows, schedules, gradients
               and halves are predicted
load           a balanced calibration: the report's own, or that of another report
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.bench.row import KINDS, Row
from experiments.simulate.reports import Calibration, Measured
from experiments.simulate.rows import Predicted, predict_row, predict_sequential
from experiments.simulate.testbed_checks import (
    BOUNDED_LOAD,
    EMULATED_SHARE,
    ITERATION_RATIO,
    ITERATION_SHARE,
    LOAD,
    OVER_BALANCED,
    REAL_SHARE,
    TWO_BATCHES,
)
from scmoe.predict.row_names import PIPELINED, batches_of

SHARES_APART = 0.05  # two shares


class Figure(NamedTuple):
    """A measured number and its predictions, all in the same unit.

    quantity: forward, train (speed-ups over sequential top-2), step (milliseconds), OVER_BALANCED
    (a training step at a load over the balanced one). again: what the calibrating report says of
    the row, or no gain. hidden: the prediction if all transfers of rows and sums were hidden.
    """

    quantity: str
    measured: float
    predicted: float
    again: float
    hidden: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def nulls(self) -> list[float]:
        """The errors of the two predictors that know nothing."""
        return [self.again / self.measured - 1, self.hidden / self.measured - 1]


@dataclass(frozen=True)
class Cell:
    """A figure of a row. report, load: where it was measured. calibrated_on: a report's name.
    assumed: what the calibrating report does not state."""

    report: str
    load: str | None
    calibrated_on: str
    assumed: tuple[str, ...]
    row: str
    figure: Figure

    @property
    def has_goal(self) -> bool:
        """Whether a goal is set for it: rows in one chunk. Sequential top-2 is what rows are
        compared with, so its speed-up shows the noise of a measurement; its times are predicted
        like any other."""
        in_one_chunk = not self.row.endswith(PIPELINED)
        compared = self.row != "top2" or self.figure.quantity in ("step", OVER_BALANCED)
        return in_one_chunk and compared and self.load in (None, BOUNDED_LOAD)

    def to_json(self) -> dict[str, Any]:
        return {
            "report": self.report,
            "load": self.load,
            "calibrated_on": self.calibrated_on,
            "assumed": list(self.assumed),
            "row": self.row,
            "quantity": self.figure.quantity,
            "measured": self.figure.measured,
            "predicted": self.figure.predicted,
            "error": self.figure.error,
            "nulls": self.figure.nulls,
        }


def cells_of(
    report: Measured, calibration: Calibration, source: Measured, batches: int = 1
) -> Iterator[Cell]:
    """Yield the cells of a report's rows with so many batches in flight. source: the report of the
    calibration."""
    calibration = calibration.with_rate(report.link_mbit)
    sequential = predict_sequential(calibration, report.load)
    for name, row in report.rows.items():
        if batches_of(name) != batches:
            continue
        inside = row.inside_gain is not None
        predicted = predict_row(calibration, name, inside, report.load)
        known = source.rows.get(name) if source is not report and report.load is None else None
        figures = [*speedups(row, known, sequential, predicted)]
        if report.setting.level == "iteration":
            again = report.rows["top2"] if known is None else known
            figures.append(
                Figure(
                    "step",
                    row.train_ms,
                    1e3 * predicted.train,
                    again.train_ms,
                    1e3 * predicted.free_train,
                )
            )
        if row.at_load is not None:
            even = predict_row(calibration, name, inside, None)
            figures.append(over_balanced(row, predicted, even))
        for figure in figures:
            yield Cell(report.name, report.load, source.name, calibration.assumed, name, figure)


def speedups(
    row: Row, known: Row | None, sequential: Predicted, predicted: Predicted
) -> Iterator[Figure]:
    """Yield a row's speed-ups over sequential top-2. known: the row in the calibrating report."""
    for kind in KINDS:
        slow = sequential.seconds(kind)
        again = 1.0 if known is None else known.speedup(kind)
        faster, hidden = slow / predicted.seconds(kind), slow / predicted.free_seconds(kind)
        yield Figure(kind, row.speedup(kind), faster, again, hidden)


def over_balanced(row: Row, uneven: Predicted, even: Predicted) -> Figure:
    """Return a training step at a load over the balanced one."""
    assert row.at_load is not None
    return Figure(
        OVER_BALANCED,
        row.at_load.over_balanced_train,
        uneven.train / even.train,
        1.0,
        uneven.free_train / even.free_train,
    )


def other_shares(reports: Sequence[Measured]) -> Iterator[Cell]:
    """Yield the cells of all reports whose setting another one has at a larger share, calibrated on
    the largest."""
    balanced = [report for report in reports if report.load is None]
    for report in balanced:
        of_the_setting = [
            other for other in balanced if other.calibration and report.same_setting(other)
        ]
        source = max(of_the_setting, key=lambda other: other.comm_share, default=report)
        if source.calibration and source.comm_share > report.comm_share + SHARES_APART:
            yield from cells_of(report, source.calibration, source)


def with_level(
    reports: Sequence[Measured], level: str, compute: str | None = None
) -> list[Measured]:
    return [
        report
        for report in reports
        if report.setting.level == level and compute in (None, report.setting.compute)
    ]


def on_own_top2(reports: Sequence[Measured], batches: int = 1) -> Iterator[Cell]:
    """Yield the cells of rows with so many batches in flight, each report calibrated on its own
    top-2."""
    for report in reports:
        if report.load is None and report.calibration:
            yield from cells_of(report, report.calibration, report, batches)


def under_load(reports: Sequence[Measured]) -> Iterator[Cell]:
    """Yield the cells of pairs with a hot rank. A report that states no balanced calibration is
    calibrated on the balanced one of its setting with the nearest rate of links."""
    pairs = with_level(reports, "block")
    for report in pairs:
        if report.load is None or not report.load.startswith("hot_rank"):
            continue
        source = report
        if report.calibration is None:
            of_the_setting = [
                other
                for other in pairs
                if other.load is None and other.calibration and report.same_setting(other)
            ]
            if not of_the_setting:
                continue
            source = min(of_the_setting, key=lambda other: abs(other.link_mbit - report.link_mbit))
        assert source.calibration is not None
        yield from cells_of(report, source.calibration, source)


def all_cells(reports: Sequence[Measured]) -> dict[str, list[Cell]]:
    """Return the cells of each check."""
    return {
        EMULATED_SHARE.name: [*other_shares(with_level(reports, "block", "emulated"))],
        REAL_SHARE.name: [*other_shares(with_level(reports, "block", "real"))],
        ITERATION_SHARE.name: [*other_shares(with_level(reports, "iteration"))],
        ITERATION_RATIO.name: [*on_own_top2(with_level(reports, "iteration"))],
        LOAD.name: [*under_load(reports)],
        TWO_BATCHES.name: [*on_own_top2(reports, 2)],
    }
