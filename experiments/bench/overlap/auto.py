"""What the planner's choices cost: the training time of a choice over that of the best schedule
that was measured in the same rounds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.overlap.overlap import Measured
from experiments.bench.rank_bench import Seconds
from experiments.bench.stacks import Variant
from scmoe.planning.clock import median
from scmoe.predict.row_names import TWO


def auto_of_both(measured: Measured, name: str) -> dict[str, Any] | None:
    """Return what `schedule=auto` has chosen between one and two batches in flight, and its
    training time over that of the best of both rows. None: no row with two was measured."""
    row = measured.rows[name]
    if row.auto is None:
        return None
    finalists = [*row.finalists, *measured.rows[name + TWO].finalists]
    return {
        "batches_in_flight": row.auto.batches_in_flight,
        "schedule": f"{row.auto.schedule.place} x {row.auto.schedule.chunks}",
        "over_best": over_best_finalist(row.auto, finalists, measured.times),
    }


def over_best_finalist(
    choice: Variant, finalists: Sequence[Variant], times: Mapping[Variant, Seconds]
) -> float:
    """Return the training time of a planner's choice over that of the best schedule.

    Half of the rounds choose the best schedule, the other half compare, and the reverse; the result
    is the mean of the two medians. The schedule that some rounds choose as the best was also lucky
    in them, so other rounds compare. The ratio is below 1 where the chosen schedule is slower than
    the planner's. With one round, that round both chooses and compares."""
    chosen = times[choice].train
    halves = [slice(start, None, 2) for start in range(min(2, len(chosen)))]
    medians = []
    for choose, compare in zip(halves, reversed(halves), strict=True):
        best = min((times[v].train for v in finalists), key=lambda train: median(train[choose]))
        medians.append(median(chosen[compare] / best[compare]))
    return sum(medians) / len(medians)
