"""The cost model equals its closed form, and a timeline can be drawn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.schedule.cost import (
    OperatorTimes,
    best_schedule,
    elapsed_time,
    exposed_time,
    mismatch,
    mismatch_bounds,
    overlap_efficiency,
    overlapped_time,
    slots,
)
from scmoe.schedule.schedule import Schedule
from tests.support.played import EVERY_OPERATOR, EVERY_WIRING

TIMES = st.fixed_dictionaries({op: st.floats(0.1, 10.0) for op in EVERY_OPERATOR})
SCHEDULES = st.sampled_from([choice for name in EVERY_WIRING for choice in slots(Schedule(*name))])


@given(SCHEDULES, TIMES)
def test_exposed_time_is_what_the_backbone_does_not_cover(schedule, times):
    """The exposed time has Section 3.2's two terms. The tolerance is 1e-9: sums of ten numbers have
    another order.

    Backward combine's gradient travels in parallel with the operators after the experts, dispatch's
    with those before.
    """
    operators = schedule.operators()
    experts = operators.index("experts")
    before = sum(times[op] for op in operators[3:experts])
    after = sum(times[op] for op in operators[experts + 2 : -1])
    expected = max(0, times["dispatch"] - before) + max(0, times["combine"] - after)
    hidden = min(times["dispatch"], before) + min(times["combine"], after)
    for direction in (OperatorTimes(times), OperatorTimes({}, times)):
        assert exposed_time(schedule, direction) == pytest.approx(expected, abs=1e-9)
        assert overlapped_time(schedule, direction) == pytest.approx(hidden, abs=1e-9)
    found = mismatch(schedule, OperatorTimes(times))
    assert found == abs(before - times["dispatch"]) + abs(after - times["combine"])


@given(SCHEDULES, TIMES)
def test_a_mismatch_lies_between_the_bounds_of_eq_11(schedule, times):
    """The bounds are the difference and the sum of the window and the transfers. The tolerance is
    1e-9: sums of ten numbers have another order."""
    least, most = mismatch_bounds(schedule, OperatorTimes(times))
    assert least - 1e-9 <= mismatch(schedule, OperatorTimes(times)) <= most + 1e-9
    transfers = times["dispatch"] + times["combine"]
    before, after = schedule.around_experts
    window = sum(times[op] for op in (*before, *after, *schedule.after_window))
    assert (least, most) == pytest.approx((abs(window - transfers), window + transfers), abs=1e-9)


def test_a_mismatch_counts_no_time_for_an_operator_that_has_none():
    schedule = Schedule("scmoe", "pos2", expert_slot=1)
    times = dict.fromkeys(schedule.operators(), 3.0)
    for operator in schedule.window + schedule.after_window:
        without = {op: time for op, time in times.items() if op != operator}
        assert mismatch(schedule, OperatorTimes(without)) == mismatch(
            schedule, OperatorTimes(times | {operator: 0.0})
        )


def test_the_best_schedule_is_the_first_of_the_fastest():
    one, two = (slots(Schedule("scmoe", "pos2", chunks=chunks)) for chunks in (1, 2))
    places = [(choice.slot, choice.inside_attention) for choice in one]
    assert places == [(0, False), (1, False), (1, True), (2, False), (3, False)]
    times = dict.fromkeys(EVERY_OPERATOR, 1.0) | {"attention": 2.0, "dispatch": 3.0, "combine": 3.0}
    slower = {op: 2 * time for op, time in times.items()}
    by_chunks = {1: OperatorTimes(times), 2: OperatorTimes(slower)}
    fastest = min(elapsed_time(choice, by_chunks[1]) for choice in one)
    equal = [choice for choice in one if elapsed_time(choice, by_chunks[1]) == fastest]
    assert len(equal) > 1 and best_schedule([*two, *one], by_chunks) == equal[0]


def test_inside_attention_is_the_best_where_it_divides_the_window_by_the_transfers():
    """Pos-1 has a window of 3 + 1 units for transfers of 2.45: 1.45 are exposed at slot 1, and 0.05
    + 0.85 inside."""
    times = dict.fromkeys(EVERY_OPERATOR, 1.0) | {"dispatch": 2.45, "combine": 2.45}
    of_chunks = {
        1: OperatorTimes(times | {"attention": 3.0, "attention_core": 2.4, "attention_out": 0.6})
    }
    best = best_schedule(slots(Schedule("scmoe", "pos1")), of_chunks)
    assert best == Schedule("scmoe", "pos1", inside_attention=True)
    assert exposed_time(best, of_chunks[1]) == pytest.approx(0.9)
    assert exposed_time(Schedule("scmoe", "pos1"), of_chunks[1]) == pytest.approx(1.45)


@pytest.mark.parametrize(("overlapped", "efficiency"), [(10, 1), (15, 0.5), (20, 0), (22, -0.2)])
def test_overlap_efficiency(overlapped, efficiency):
    assert overlap_efficiency(overlapped, sequential=20, free=10) == pytest.approx(efficiency)
