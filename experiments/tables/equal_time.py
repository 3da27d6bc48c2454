"""Compares losses at equal time, to say what a row's speed is worth.

A row that is x times as fast as sequential top-2 makes its steps in 1/x of the time. At the time at
which the fastest row ends, a row of speed x has made steps * x / max(x) of its steps; its loss
there is read off its own validation curve, between two validations on a straight line. The learning
rate of every row decays over all its steps, so a slower row is compared before the end of its
decay: a schedule made for the shorter run would bring it closer.

A row's speed is that of the faster of one and two batches in flight, each in one chunk. So top-2
has a speed above 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from experiments.tables.seed_statistics import describe, differences
from experiments.tables.table_file import PaperTable
from experiments.tables.table_runs import Run
from scmoe.config.derived import max_steps
from scmoe.predict.row_names import TWO, batches_of

SPEED = "train_speedup"  # of four blocks, forward and backward, over sequential top-2
Report = Mapping[str, Any]  # of `bench overlap`


def at_equal_time(
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
    equal_tokens = _at_speeds(table, done, dict.fromkeys(measured, 1.0))
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


def best_speed(report: Report, row: str) -> float:
    """Return a row's speed-up over sequential top-2 with one or with two batches in flight."""
    rows = [name for name in (row, row + TWO) if name in report["rows"]]
    return max(report["rows"][name][SPEED] for name in rows)


def _at_speeds(
    table: PaperTable, done: Sequence[Run], speeds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return speed, step, loss and minus_baseline by row. speeds: by row."""
    losses: dict[str, dict[int, float]] = {name: {} for name in speeds}
    steps = {name: 0.0 for name in speeds}
    fastest = max(speeds.values(), default=1.0)
    for run in done:
        if (name := run.row.name) in speeds:
            steps[name] = step_reached(max_steps(run.config), speeds[name], fastest)
            loss = loss_at(run.state.results["curve"], steps[name])
            if loss is not None:
                losses[name][run.seed] = loss
    minus = differences(table.rows, losses)
    return {
        name: {
            "speed": speeds[name],
            "step": round(steps[name]),
            "loss": {**describe(losses[name]), "by_seed": losses[name]},
            "minus_baseline": minus.get(name),
        }
        for name in speeds
    }


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
