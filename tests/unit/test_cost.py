"""The cost model against its closed form, and the drawing of a timeline."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.schedule.cost import best_slot, elapsed_time, exposed_time, mismatch
from scmoe.schedule.plan import WINDOWS, Schedule
from scmoe.schedule.timeline import draw, elapsed, play

OPERATORS = (
    "route",
    "encode",
    "dispatch",
    "experts",
    "combine",
    "decode",
    "attention",
    "mlp",
    "shared_expert",
)
TIMES = st.fixed_dictionaries({op: st.floats(0.1, 10.0) for op in OPERATORS})
SCHEDULES = st.builds(
    lambda position, slot: Schedule(position, slot % (len(WINDOWS[position]) + 1)),
    st.sampled_from(sorted(WINDOWS)),
    st.integers(0, 4),
)


@given(SCHEDULES, TIMES)
def test_exposed_time_is_what_the_backbone_does_not_cover(schedule, times):
    """Section 3.2's two terms. 1e-9: sums of ten numbers in another order."""
    before = sum(times[op] for op in schedule.window[: schedule.slot])
    after = sum(times[op] for op in schedule.window[schedule.slot :])
    expected = max(0, times["dispatch"] - before) + max(0, times["combine"] - after)
    assert exposed_time(schedule, times) == pytest.approx(expected, abs=1e-9)
    assert mismatch(schedule, times) == abs(before - times["dispatch"]) + abs(after - times["combine"])


@given(SCHEDULES, TIMES, st.integers(1, 4))
def test_the_best_slot_is_no_slower_than_any(schedule, times, chunks):
    schedule = replace(schedule, chunks=chunks)
    best = elapsed_time(best_slot(schedule, times), times)
    for slot in range(len(schedule.window) + 1):
        assert best <= elapsed_time(replace(schedule, expert_slot=slot), times)


@given(SCHEDULES, TIMES)
def test_sequential_time_is_the_sum_of_all(schedule, times):
    operators = schedule.operators()
    spans = play(operators, times, sequential=True)
    assert elapsed(spans) == pytest.approx(sum(times[op] for op in operators), abs=1e-9)


@given(SCHEDULES, TIMES, st.integers(1, 4))
def test_neither_row_does_two_things_at_once(schedule, times, chunks):
    spans = play(replace(schedule, chunks=chunks).operators(), times)
    for transfers in (True, False):
        row = sorted((s.start, s.end) for s in spans if s.is_transfer is transfers)
        assert all(end <= start for (_, end), (start, _) in pairwise(row))


def test_a_timeline_is_drawn(tmp_path):
    times = dict.fromkeys(OPERATORS, 1.0)
    draw({"pos2": play(Schedule("pos2").operators(), times)}, tmp_path / "figures" / "t.png", "title")
    assert (tmp_path / "figures" / "t.png").read_bytes().startswith(b"\x89PNG")
