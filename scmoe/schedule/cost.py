"""What a schedule costs: elapsed time of the window, exposed communication, Eq. 11, and the best schedule.

Eq. 11 chooses the slot by |T_pre - T_disp| + |T_post - T_comb|, a mismatch. The elapsed time of a pair is all its
computation plus the parts of the transfers that the backbone does not cover, so this module chooses by elapsed time
(docs/decisions/0007-schedule-slots.md). With one chunk the uncovered parts are

    max(0, T_disp - T_pre) + max(0, T_comb - T_post)

T_pre, T_post: backbone time before and after the experts. With more chunks, and for backward, the timeline is played.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scmoe.schedule.play import elapsed, play
from scmoe.schedule.schedule import Schedule

PER_CHUNK = ("dispatch", "experts", "combine")


@dataclass(frozen=True)
class OperatorTimes:
    """Time of each operator, forward and backward, summed over chunks. Without backward times it is inference."""

    forward: Mapping[str, float]
    backward: Mapping[str, float] = field(default_factory=dict)


def elapsed_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Time from the tap to the end of the block, and back if there are backward times."""
    directions = (schedule.operators(), times.forward), (schedule.backward_operators(), times.backward)
    return sum(elapsed(play(operators, per_chunk(schedule, own))) for operators, own in directions)


def per_chunk(schedule: Schedule, times: Mapping[str, float]) -> dict[str, float]:
    return {op: t / schedule.chunks if op in PER_CHUNK else t for op, t in times.items()}


def exposed_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Part of the elapsed time in which the processor waits for a transfer: all but the time of the computation."""
    before, after = schedule.around_experts
    operators = ("route", "encode", *before, *after, *schedule.after_window, "experts", "decode")
    computing = sum(direction.get(op, 0.0) for direction in (times.forward, times.backward) for op in operators)
    return elapsed_time(schedule, times) - computing


def mismatch(schedule: Schedule, times: OperatorTimes) -> float:
    """Eq. 11's objective for the schedule's slot; it depends on forward times only."""
    own_before, own_after = schedule.around_experts
    before = sum(times.forward.get(op, 0.0) for op in own_before)
    after = sum(times.forward.get(op, 0.0) for op in own_after + schedule.after_window)
    return abs(before - times.forward["dispatch"]) + abs(after - times.forward["combine"])


def slots(schedule: Schedule) -> list[Schedule]:
    """The same schedule at every slot of its window, and inside each attention of it, in the order of the window."""
    whole = [(slot, False) for slot in range(len(schedule.window) + 1)]
    inside = [(slot, True) for slot in schedule.attentions]
    return [replace(schedule, expert_slot=slot, inside_attention=part) for slot, part in sorted(whole + inside)]


def best_schedule(choices: Iterable[Schedule], times: Mapping[int, OperatorTimes]) -> Schedule:
    """The choice with the least elapsed time; of equal ones the first. times: by number of chunks."""
    return min(choices, key=lambda choice: elapsed_time(choice, times[choice.chunks]))


def overlap_efficiency(overlapped: Any, sequential: Any, free: Any) -> Any:
    """1 - (T_overlapped - T_free) / (T_sequential - T_free), FLUX's definition: 1 where all communication is hidden, 0
    where none is, below 0 where hiding it costs more than it saves. free: the time without communication, so
    computation that a transfer slows down lowers the efficiency. Numbers, or arrays of them."""
    return 1 - (overlapped - free) / (sequential - free)
