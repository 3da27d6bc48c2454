"""Two batches in flight, played: the halves of a batch go through a stack of blocks in turns
(models/halves.py, moe/turns.py).

    computation    A M A 1 | A M A 2 | E 1 | E 2 | A M A 1      | A M A 2      | E 1 ...
    transfers              | D 1     | D 2 | C 1 | C 2          | D 1          | ...

A half runs until it must wait for a transfer. Then it passes its turn, whether or not the rows have
arrived, so the order of the operators does not depend on their times. Autograd runs the nodes in
the reverse order, so backward's order is the mirror of forward's: a wait becomes a launch, and a
launch a wait.

Rows are even, and a rank's link carries one transfer after another. Halves have half the rows. What
products of half the rows cost beyond half the time must be measured (`half_of`). The announcement
of numbers of rows is left out, and so are the transfers inside DGMoE's current half.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from scmoe.schedule.cost import (
    LAUNCH,
    TRANSFERS,
    BusyLink,
    OperatorTimes,
    Span,
    computing_time,
    elapsed,
    per_chunk,
)
from scmoe.schedule.schedule import Schedule

BEFORE = "before"  # an operator: all that a block computes before its tap
Layers = Sequence[tuple[Schedule, OperatorTimes]]
"""The blocks with an MoE, in order, and the times of their operators, BEFORE among them."""


class Action(NamedTuple):
    """A part of a rank's work. layer: of the stack. chunk: of a transfer."""

    kind: Literal["compute", "launch", "wait"]
    half: int
    layer: int
    operator: str
    chunk: int = 0

    def mirrored(self) -> "Action":
        kinds: dict[str, Literal["compute", "launch", "wait"]] = {
            "compute": "compute",
            "launch": "wait",
            "wait": "launch",
        }
        return self._replace(kind=kinds[self.kind])

    @property
    def transfer(self) -> tuple[int, int, str, int]:
        return self.half, self.layer, self.operator, self.chunk


def actions_of(half: int, layer: int, schedule: Schedule) -> list[Action]:
    """Return what a half does in a block, in order. It passes its turn before each wait."""
    actions = [Action("compute", half, layer, BEFORE)]
    launched = dict.fromkeys(TRANSFERS, 0)
    computed = 0
    for operator in schedule.operators():
        if operator in TRANSFERS:
            actions.append(Action("launch", half, layer, operator, launched[operator]))
            launched[operator] += 1
            continue
        if operator == "experts":
            actions.append(Action("wait", half, layer, "dispatch", computed))
            computed += 1
        elif operator == "decode":
            actions += [Action("wait", half, layer, "combine", i) for i in range(schedule.chunks)]
        actions.append(Action("compute", half, layer, operator))
    return actions


def order_of(schedules: Sequence[Schedule], batches: int = 2) -> list[Action]:
    """Return what a rank does in forward, in order, with so many batches in flight.

    schedules: of the blocks, in order."""
    left = [
        deque(
            action
            for layer, schedule in enumerate(schedules)
            for action in actions_of(half, layer, schedule)
        )
        for half in range(batches)
    ]
    order = []
    while any(left):
        for actions in left:
            if actions:
                order.append(actions.popleft())
            while actions and actions[0].kind != "wait":
                order.append(actions.popleft())
    return order


def play_order(
    order: Sequence[Action], times: Sequence[Mapping[str, float]], link: BusyLink | None = None
) -> list[list[Span]]:
    """Return when each operator of each half runs.

    order: of forward, or mirrored and reversed of backward. times: of each block, as long as an
    operator takes in a half, of a chunk where there are several; one that is missing takes none.
    link: as of cost.play_ranks."""
    now = 0.0
    link_is_free = 0.0
    arrives: dict[tuple[int, int, str, int], float] = {}
    spans: list[list[Span]] = [[] for _ in {action.half for action in order}]
    for action in order:
        duration = times[action.layer].get(action.operator, 0.0)
        if action.kind == "wait":
            now = max(now, arrives[action.transfer])
        elif action.kind == "launch":
            if LAUNCH in times[action.layer]:
                launched = now + times[action.layer][LAUNCH]
                spans[action.half].append(Span(LAUNCH, now, launched))
                now = launched
            begin = max(now, link_is_free)
            later = 0.0 if link is None else link.meets(begin, duration)
            link_is_free = arrives[action.transfer] = begin + duration + later
            spans[action.half].append(Span(action.operator, begin, link_is_free))
        else:
            spans[action.half].append(Span(action.operator, now, now + duration))
            now += duration
            if link is not None:
                link.computed(spans[action.half][-1], action.layer, action.half)
    return spans


def play_halves(
    layers: Layers, direction: Literal["forward", "backward"] = "forward", batches: int = 2
) -> list[list[Span]]:
    """Return when each operator of each half runs in a direction. layers: with times of a half."""
    order = order_of([schedule for schedule, _ in layers], batches)
    if direction == "backward":
        order = [action.mirrored() for action in reversed(order)]
    times = [
        per_chunk(schedule, each.forward if direction == "forward" else each.backward)
        for schedule, each in layers
    ]
    return play_order(order, times)


def half_of(times: OperatorTimes, longer: float = 1.0) -> OperatorTimes:
    """Return the times of half the rows, from those of all rows. longer: by what factor computing
    all rows takes longer in two halves."""

    def half(whole: Mapping[str, float]) -> dict[str, float]:
        return {
            operator: seconds / 2 * (1.0 if operator in TRANSFERS else longer)
            for operator, seconds in whole.items()
        }

    return OperatorTimes(half(times.forward), half(times.backward))


def stack_time(layers: Layers, batches: int) -> float:
    """Return the time of a stack of blocks, forward and, if there are backward times, backward.

    layers: with times of one of so many batches in flight."""
    total = 0.0
    for direction in ("forward", "backward"):
        spans = play_halves(layers, direction, batches)
        total += max(map(elapsed, spans))
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
