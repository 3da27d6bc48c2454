"""Losses of a table's rows at equal time: what a row's speed is worth.

A row that is x times as fast as sequential top-2 makes its steps in 1/x of the time. At the time T at which the fastest
row ends, a row of speed x has made steps * x / max(x) of its steps; its loss there is read off its own validation
curve, between two validations on a straight line. The learning rate of every row decays over all its steps, so a slower
row is compared before the end of its decay: a schedule made for the shorter run would bring it closer.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from scmoe.experiments.studies.table.rows import Table
from scmoe.experiments.studies.table.statistics import ALPHA, compare, describe, holm
from scmoe.experiments.studies.table.table_runs import Run

SPEED = "train_speedup"  # of one pair of blocks, forward and backward, over sequential top-2


def at_equal_time(
    table: Table, finished: Sequence[Run], speeds: Mapping[float, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return {share of communication, as text: {comm_share, rows}}. rows: for each row that has a speed, its speed, the
    step reached, the loss at that step over seeds and its difference to the baseline. `equal_tokens`: all speeds are 1.

    Empty if the table's file has no equal_time. A share without measured speeds is left out.
    """
    if not table.equal_time:
        return {}
    measured = {row.name: row.speed for row in table.rows if row.speed is not None}
    found = {"equal_tokens": {"comm_share": 0.0, "rows": _rows(table, finished, dict.fromkeys(measured, 1.0))}}
    for share in table.equal_time:
        if share in speeds:
            of_rows = {name: speeds[share]["rows"][speed][SPEED] for name, speed in measured.items()}
            found[f"{share:g}"] = {"comm_share": speeds[share]["comm_share"], "rows": _rows(table, finished, of_rows)}
    return found


def _rows(table: Table, finished: Sequence[Run], speeds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return speed, step, loss and minus_baseline by row. speeds: by row."""
    losses: dict[str, dict[int, float]] = {name: {} for name in speeds}
    steps = {name: 0.0 for name in speeds}
    for run in finished:
        if (name := run.row.name) in speeds:
            steps[name] = step_reached(run.config.trainer.max_steps, speeds[name], max(speeds.values()))
            loss = loss_at(run.state.results["curve"], steps[name])
            if loss is not None:
                losses[name][run.seed] = loss
    compared = [row for row in table.rows if row.name in speeds and row.baseline in speeds and not row.is_baseline]
    minus = {r.name: compare(losses[r.name], losses[r.baseline], len(compared)) for r in compared}
    for row, p in zip(compared, holm([minus[r.name]["p"] for r in compared], len(compared)), strict=True):
        minus[row.name] |= {"p": p, "decided": p is not None and p < ALPHA}
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
    """Return how many of its steps a row has made when the fastest one ends, which has made exactly all."""
    return steps * (speed / fastest)


def loss_at(curve: Sequence[Sequence[float]], step: float) -> float | None:
    """Return the loss at a step, between two points of the curve on a straight line; None outside the curve."""
    for (before, earlier), (after, later) in pairwise(curve):
        if before <= step <= after:
            return earlier + (later - earlier) * (step - before) / (after - before)
    return next((loss for at, loss in curve if at == step), None)
