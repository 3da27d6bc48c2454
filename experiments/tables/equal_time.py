"""Compares losses at equal time, to say what a row's speed is worth.

A row that is x times as fast as sequential top-2 makes its steps in 1/x of the time. At the time at
which the fastest row ends, a row of speed x has made steps * x / max(x) of its steps; its loss
there is read off its own validation curve, between two validations on a straight line. The learning
rate of every row decays over all its steps, so a slower row is compared before the end of its
decay: a schedule made for the shorter run would bring it closer.

A row's speed is that of the faster of one and two batches in flight, each in one chunk. So top-2
has a speed above 1. Speeds have been measured too: `with_speeds` is the interval of a difference
where the row's speed is at its lower quartile and the baseline's at its upper one, or the reverse,
whichever is wider on each side.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from experiments.tables.seed_statistics import describe, differences
from experiments.tables.table_file import PaperTable
from experiments.tables.table_runs import Run
from scmoe.config.derived import max_steps
from scmoe.predict.row_names import TWO, architecture_of, batches_of

Report = Mapping[str, Any]  # of `bench overlap`


class Speed(NamedTuple):
    """How many times as fast as sequential top-2 a row trains: median and quartiles."""

    median: float
    low: float
    high: float


EQUAL = Speed(1.0, 1.0, 1.0)


def compare_at_equal_time(
    table: PaperTable, done: Sequence[Run], speeds: Mapping[float, Report]
) -> dict[str, dict[str, Any]]:
    """Return {share of communication, as text: {comm_share, two_batches, rows}}. two_batches:
    whether rows were measured with two batches in flight too. rows: for each row that has a speed,
    its speed, the step reached, the loss at that step over seeds and its difference to the
    baseline. `equal_tokens`: all speeds are 1.

    Empty if the table's file has no equal_time. A share without measured speeds is left out.
    """
    if not table.equal_time:
        return {}
    measured = {row.name: row.speed for row in table.rows if row.speed is not None}
    equal_tokens = _at_speeds(table, done, dict.fromkeys(measured, EQUAL))
    columns: dict[str, dict[str, Any]] = {"equal_tokens": {"comm_share": 0.0, "rows": equal_tokens}}
    for share in table.equal_time:
        if share in speeds:
            report = speeds[share]
            of_rows = {name: best_speed(report, speed) for name, speed in measured.items()}
            rows = _at_speeds(table, done, of_rows)
            two = any(batches_of(row) == 2 for row in report["rows"])
            columns[f"{share:g}"] = {
                "comm_share": report["comm_share"],
                "two_batches": two,
                "rows": rows,
            }
    return columns


def best_speed(report: Report, row: str) -> Speed:
    """Return a row's speed-up over sequential top-2 with one or with two batches in flight."""
    both = row, architecture_of(row) + TWO
    names = [name for name in both if name in report["rows"]]
    rows = [report["rows"][name] for name in names]
    best = max(rows, key=lambda row: row["train_speedup"])
    return Speed(best["train_speedup"], *best["train_quartiles"])


def _at_speeds(
    table: PaperTable, done: Sequence[Run], speeds: Mapping[str, Speed]
) -> dict[str, dict[str, Any]]:
    """Return speed, step, loss and minus_baseline by row. speeds: by row."""
    medians = {name: speed.median for name, speed in speeds.items()}
    fastest = max(medians.values(), default=1.0)
    steps, losses = losses_at(done, medians, fastest)
    minus = differences(table.rows, losses)
    if any(speed != EQUAL for speed in speeds.values()):
        for name, difference in minus.items():
            difference["with_speeds"] = interval_with_speeds(table, done, speeds, name)
    return {
        name: {
            "speed": medians[name],
            "step": round(steps[name]),
            "loss": {**describe(losses[name]), "by_seed": losses[name]},
            "minus_baseline": minus.get(name),
        }
        for name in speeds
    }


def interval_with_speeds(
    table: PaperTable, done: Sequence[Run], speeds: Mapping[str, Speed], name: str
) -> list[float] | None:
    """Return the interval of a row's difference that holds those with the row's and its baseline's
    speed at opposite quartiles; None: too few seeds for one."""
    (baseline,) = (row.baseline for row in table.rows if row.name == name)
    medians = {each: speed.median for each, speed in speeds.items()}
    bounds = []
    for row_speed, its_baseline in (
        (speeds[name].low, speeds[baseline].high),
        (speeds[name].high, speeds[baseline].low),
    ):
        changed = medians | {name: row_speed, baseline: its_baseline}
        losses = losses_at(done, changed, max(changed.values()))[1]
        other = differences(table.rows, losses)[name]
        bounds += [other["low"], other["high"]]
    known = [bound for bound in bounds if bound is not None]
    return [min(known), max(known)] if known else None


def losses_at(
    done: Sequence[Run], speeds: Mapping[str, float], fastest: float
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """Return the step that each row has reached when a row of speed `fastest` ends, and its losses
    there by seed."""
    losses: dict[str, dict[int, float]] = {name: {} for name in speeds}
    steps = {name: 0.0 for name in speeds}
    for run in done:
        if (name := run.row.name) in speeds:
            steps[name] = step_reached(max_steps(run.config), speeds[name], fastest)
            loss = loss_at(run.state.results["curve"], steps[name])
            if loss is not None:
                losses[name][run.seed] = loss
    return steps, losses


def step_reached(steps: int, speed: float, fastest: float) -> float:
    """Return how many of its steps a row has made when the fastest one ends, which has made exactly
    all."""
    return steps * (speed / fastest)


def loss_at(curve: Sequence[Sequence[float]], step: float) -> float | None:
    """Return the loss at a step, between two points of the curve on a straight line; None outside
    the curve."""
    if not curve or not curve[0][0] <= step <= curve[-1][0]:
        return None
    steps, losses = zip(*curve, strict=True)
    return float(numpy.interp(step, steps, losses))
