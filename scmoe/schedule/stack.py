"""A stack of blocks with several batches in flight, in seconds (play.py).

Rows are even, and halves have half the rows. Left out are: what products of half the rows cost
beyond half the time, unless the times of halves are measured; the announcement of numbers of rows;
the transfers inside DGMoE's current half.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from scmoe.schedule.cost import OperatorTimes, computing_time, per_chunk
from scmoe.schedule.play import BEFORE, Span, elapsed, mirror, order_of, play
from scmoe.schedule.schedule import Schedule

Layers = Sequence[tuple[Schedule, OperatorTimes]]
"""The blocks with an MoE, in order, and the times of their operators, BEFORE among them."""


def play_stack(
    layers: Layers, direction: Literal["forward", "backward"] = "forward", batches: int = 2
) -> list[Span]:
    """Return when each operator of each half runs in a direction. layers: with times of a half."""
    order = order_of([schedule for schedule, _ in layers], batches)
    if direction == "backward":
        order = mirror(order)
    times = [
        per_chunk(schedule, each.forward if direction == "forward" else each.backward)
        for schedule, each in layers
    ]
    return play(order, times)[0]


def half_of(times: OperatorTimes) -> OperatorTimes:
    """Return the times of half the rows, from those of all rows: half of each."""

    def half(whole: Mapping[str, float]) -> dict[str, float]:
        return {operator: seconds / 2 for operator, seconds in whole.items()}

    return OperatorTimes(half(times.forward), half(times.backward))


def stack_time(layers: Layers, batches: int) -> float:
    """Return the time of a stack of blocks, forward and, if there are backward times, backward.

    layers: with times of one batch in flight (of a half if batches is 2)."""
    total = 0.0
    for direction in ("forward", "backward"):
        total += elapsed(play_stack(layers, direction, batches))
    return total


def time_before_taps(layers: Layers) -> float:
    """Return the time of what one batch computes before the taps."""
    return sum(
        times.forward.get(BEFORE, 0.0) + times.backward.get(BEFORE, 0.0) for _, times in layers
    )


def windows_time(layers: Layers) -> float:
    """Return the time of all windows with two batches in flight: `stack_time` minus the time before
    the taps. It is compared with the sum of cost.elapsed_time, which begins at the tap.

    layers: with times of a half."""
    return stack_time(layers, 2) - 2 * time_before_taps(layers)


def waiting_time(layers: Layers) -> float:
    """Return how long a stack with two batches in flight waits for transfers. layers: with times of
    a half."""
    computing = sum(computing_time(schedule, times) for schedule, times in layers)
    return windows_time(layers) - 2 * computing
