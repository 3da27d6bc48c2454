"""What a schedule costs: elapsed time of the window, exposed communication, Eq. 11, and the best slot.

Eq. 11 chooses the slot by |T_pre - T_disp| + |T_post - T_comb|, a mismatch; what a pair really takes is all its
computation plus the parts of the transfers that the backbone does not cover, so the slot is chosen by that
(docs/decisions/0007-schedule-slots.md). With one chunk the two terms are

    max(0, T_disp - T_pre) + max(0, T_comb - T_post)

T_pre, T_post: backbone time before and after the experts. With more chunks the timeline is played.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from scmoe.schedule.plan import Schedule
from scmoe.schedule.timeline import elapsed, play

PER_CHUNK = ("dispatch", "experts", "combine")


def elapsed_time(schedule: Schedule, times: Mapping[str, float]) -> float:
    """From the tap to the end of the block. times: each operator's, of all chunks together."""
    share = {op: t / schedule.chunks if op in PER_CHUNK else t for op, t in times.items()}
    return elapsed(play(schedule.operators(), share))


def exposed_time(schedule: Schedule, times: Mapping[str, float]) -> float:
    """The part of the elapsed time in which the processor waits for a transfer."""
    computation = ("route", "encode", *schedule.window, "experts", "decode")
    return elapsed_time(schedule, times) - sum(times.get(op, 0.0) for op in computation)


def mismatch(schedule: Schedule, times: Mapping[str, float]) -> float:
    """Eq. 11's objective for the schedule's slot."""
    before = sum(times.get(op, 0.0) for op in schedule.window[: schedule.slot])
    after = sum(times.get(op, 0.0) for op in schedule.window[schedule.slot :])
    return abs(before - times["dispatch"]) + abs(after - times["combine"])


def best_slot(schedule: Schedule, times: Mapping[str, float]) -> Schedule:
    """The same schedule with the slot that takes the least time; the earliest of equals."""
    choices = [replace(schedule, expert_slot=slot) for slot in range(len(schedule.window) + 1)]
    return min(choices, key=lambda choice: elapsed_time(choice, times))
