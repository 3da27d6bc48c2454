"""What a schedule costs: its operators are played (play.py), which gives the elapsed time of the
window, the exposed and the overlapped communication; Eq. 11, and the best schedule.

Eq. 11 chooses the slot by |T_pre - T_disp| + |T_post - T_comb|, a mismatch. The elapsed time of a
pair is all its computation plus the parts of the transfers that the backbone does not cover, so
this module chooses by elapsed time (docs/decisions/0007-schedule-slots.md). With one chunk the
uncovered parts are

    max(0, T_disp - T_pre) + max(0, T_comb - T_post)

T_pre, T_post: backbone time before and after the experts. With more chunks, and for backward, the
timeline is played.

Eq. 11 also bounds its mismatch, over all slots, by the backbone's time and that of both transfers:

    |T_backbone - T_transfers| <= mismatch <= T_backbone + T_transfers,  T_backbone = T_pre + T_post
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scmoe.schedule.play import BEFORE, PER_CHUNK, TRANSFERS, Span, elapsed, mirror, order_of, play
from scmoe.schedule.schedule import Schedule


@dataclass(frozen=True)
class OperatorTimes:
    """Time of each operator, summed over chunks. Inference has no backward times."""

    forward: Mapping[str, float]
    backward: Mapping[str, float] = field(default_factory=dict)


def elapsed_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return the time from the tap to the end of the block; with backward times, also back."""
    forward = play_block(schedule, per_chunk(schedule, times.forward))
    backward = play_block(schedule, per_chunk(schedule, times.backward), backward=True)
    return elapsed(forward) + elapsed(backward)


def play_block(
    schedule: Schedule, times: Mapping[str, float], backward: bool = False, sequential: bool = False
) -> list[Span]:
    """Return when each operator of a block runs in one direction, from the tap on, with one batch
    in flight and even rows. times: of each operator where it runs once."""
    order = [a for a in order_of([schedule], sequential=sequential) if a.operator != BEFORE]
    return play(mirror(order) if backward else order, [times])[0]


def per_chunk(schedule: Schedule, times: Mapping[str, float]) -> dict[str, float]:
    """Return the time of one run of each operator; of PER_CHUNK ones, of one chunk."""
    return {op: t / schedule.chunks if op in PER_CHUNK else t for op, t in times.items()}


def computing_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return the time of all computation from the tap to the end of the block, and back."""
    before, after = schedule.around_experts
    operators = ("route", "encode", *before, *after, *schedule.after_window, "experts", "decode")
    return sum(
        direction.get(op, 0.0) for direction in (times.forward, times.backward) for op in operators
    )


def exposed_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return the part of the elapsed time in which the processor waits for a transfer."""
    return elapsed_time(schedule, times) - computing_time(schedule, times)


def overlapped_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return how long transfers run beside computation."""
    transfers = sum(
        direction.get(op, 0.0) for direction in (times.forward, times.backward) for op in TRANSFERS
    )
    return transfers - exposed_time(schedule, times)


def mismatch(schedule: Schedule, times: OperatorTimes) -> float:
    """Return Eq. 11's objective for the schedule's slot; it depends on forward times only."""
    pre, post = _around_experts(schedule, times)
    return abs(pre - times.forward["dispatch"]) + abs(post - times.forward["combine"])


def mismatch_bounds(schedule: Schedule, times: OperatorTimes) -> tuple[float, float]:
    """Return Eq. 11's lower and upper bound on the mismatch, which no slot changes."""
    backbone = sum(_around_experts(schedule, times))
    transfers = times.forward["dispatch"] + times.forward["combine"]
    return abs(backbone - transfers), backbone + transfers


def _around_experts(schedule: Schedule, times: OperatorTimes) -> tuple[float, float]:
    """Return T_pre and T_post, forward."""
    before, after = schedule.around_experts
    pre = sum(times.forward.get(op, 0.0) for op in before)
    post = sum(times.forward.get(op, 0.0) for op in after + schedule.after_window)
    return pre, post


def slots(schedule: Schedule) -> list[Schedule]:
    """Return the schedule at every slot of its window and inside each attention, in their order."""
    between = [(slot, False) for slot in range(len(schedule.window) + 1)]
    inside = [(slot, True) for slot in schedule.attentions]
    return [
        replace(schedule, expert_slot=slot, inside_attention=is_inside)
        for slot, is_inside in sorted(between + inside)
    ]


def best_schedule(choices: Iterable[Schedule], times: Mapping[int, OperatorTimes]) -> Schedule:
    """Return the choice with the least elapsed time; of equal ones the first.

    times: by number of chunks.
    """
    return min(choices, key=lambda choice: elapsed_time(choice, times[choice.chunks]))


def overlap_efficiency(overlapped: Any, sequential: Any, free: Any) -> Any:
    """Return 1 - (T_overlapped - T_free) / (T_sequential - T_free), FLUX's definition.

    It is 1 where all communication is hidden, 0 where none is, below 0 where hiding it costs more
    than it saves. free: the time without communication, so computation that a transfer slows down
    lowers the efficiency. The times are numbers, or arrays of them.
    """
    return 1 - (overlapped - free) / (sequential - free)
