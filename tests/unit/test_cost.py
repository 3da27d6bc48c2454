"""The cost model equals its closed form, and a timeline can be drawn."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.experiments.engine.gantt import draw
from scmoe.schedule.cost import OperatorTimes, exposed_time, mismatch, overlap_efficiency, slots
from scmoe.schedule.play import elapsed, play
from scmoe.schedule.schedule import ARCHITECTURES, Schedule

OPERATORS = (
    *("route", "encode", "dispatch", "experts", "combine", "decode"),
    *("attention", "mlp", "shared_expert", "current"),
)
TIMES = st.fixed_dictionaries({op: st.floats(0.1, 10.0) for op in OPERATORS})
NAMES = [(name, position) for name, positions in ARCHITECTURES.items() for position in positions or (None,)]
SCHEDULES = st.sampled_from([choice for name in NAMES for choice in slots(Schedule(*name))])


@given(SCHEDULES, TIMES)
def test_exposed_time_is_what_the_backbone_does_not_cover(schedule, times):
    """The exposed time has Section 3.2's two terms. The tolerance is 1e-9: sums of ten numbers have another order.

    Backward combine's gradient travels in parallel with the operators after the experts, dispatch's with those before.
    """
    before = sum(times[op] for op in schedule.window[: schedule.slot])
    after = sum(times[op] for op in schedule.window[schedule.slot :] + schedule.after_window)
    expected = max(0, times["dispatch"] - before) + max(0, times["combine"] - after)
    for direction in (OperatorTimes(times), OperatorTimes({}, times)):
        assert exposed_time(schedule, direction) == pytest.approx(expected, abs=1e-9)
    found = mismatch(schedule, OperatorTimes(times))
    assert found == abs(before - times["dispatch"]) + abs(after - times["combine"])


@pytest.mark.parametrize(("overlapped", "efficiency"), [(10, 1), (15, 0.5), (20, 0), (22, -0.2)])
def test_overlap_efficiency(overlapped, efficiency):
    assert overlap_efficiency(overlapped, sequential=20, free=10) == pytest.approx(efficiency)


@given(SCHEDULES, TIMES)
def test_sequential_time_is_the_sum_of_all(schedule, times):
    for operators in (schedule.operators(), schedule.backward_operators()):
        spans = play(operators, times, sequential=True)
        assert elapsed(spans) == pytest.approx(sum(times[op] for op in operators), abs=1e-9)


@given(SCHEDULES, TIMES, st.integers(1, 4))
def test_neither_row_of_a_timeline_has_overlapping_spans(schedule, times, chunks):
    spans = play(replace(schedule, chunks=chunks).operators(), times)
    for transfers in (True, False):
        row = sorted((s.start, s.end) for s in spans if s.is_transfer is transfers)
        assert all(end <= start for (_, end), (start, _) in pairwise(row))


def test_a_timeline_is_drawn(tmp_path):
    times = dict.fromkeys(OPERATORS, 1.0)
    draw({"pos2": play(Schedule("scmoe", "pos2").operators(), times)}, tmp_path / "figures" / "t.png", "title")
    assert (tmp_path / "figures" / "t.png").read_bytes().startswith(b"\x89PNG")
