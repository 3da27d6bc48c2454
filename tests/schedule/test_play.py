"""A timeline of one rank equals that of every rank where rows are even; with uneven rows the
busiest rank decides."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.schedule.cost import play_block, slots
from scmoe.schedule.play import (
    EVEN,
    TRANSFERS,
    Share,
    beside_backward,
    elapsed,
    mirror,
    order_of,
    play,
    shares,
)
from scmoe.schedule.schedule import ATTENTION_PARTS, POSITIONS_OF, Schedule
from tests.support.played import hot_rank, step_ms

OPERATORS = (
    *("route", "encode", "dispatch", "experts", "combine", "decode"),
    *("attention", *ATTENTION_PARTS, "mlp", "shared_expert", "current"),
)
TIMES = st.fixed_dictionaries({op: st.floats(0.1, 10.0) for op in OPERATORS})
NAMES = [
    (name, position)
    for name, positions in POSITIONS_OF.items()
    for position in positions or (None,)
]
SCHEDULES = st.sampled_from([choice for name in NAMES for choice in slots(Schedule(*name))])


@given(SCHEDULES, TIMES)
def test_sequential_time_is_the_sum_of_all(schedule, times):
    for backward, operators in enumerate((schedule.operators(), schedule.backward_operators())):
        spans = play_block(schedule, times, bool(backward), sequential=True)
        assert sorted(span.operator for span in spans) == sorted(operators)
        assert elapsed(spans) == pytest.approx(sum(times[op] for op in operators), abs=1e-9)


@given(SCHEDULES, TIMES, st.integers(1, 4))
def test_neither_row_of_a_timeline_has_overlapping_spans(schedule, times, chunks):
    spans = play_block(replace(schedule, chunks=chunks), times)
    for transfers in (True, False):
        row = sorted((s.start, s.end) for s in spans if s.is_transfer is transfers)
        assert all(end <= start for (_, end), (start, _) in pairwise(row))


@given(SCHEDULES, TIMES, st.integers(1, 4), st.sampled_from([2, 4]), st.booleans())
def test_ranks_with_even_rows_run_as_one_rank(schedule, times, chunks, ranks, sequential):
    even = shares([[3.0] * ranks] * ranks)
    assert even == [EVEN] * ranks
    order = order_of([replace(schedule, chunks=chunks)], sequential=sequential)
    for each in (order, mirror(order)):
        expected = play(each, [times])
        assert play(each, [times], [[even] * chunks]) == expected * ranks


@given(SCHEDULES, TIMES, st.sampled_from([(2, 1.3), (2, 2.0), (4, 1.7), (4, 4.0)]))
def test_with_one_chunk_the_busiest_rank_decides(schedule, times, load):
    """Section 3.2's two terms with `load` times the transfers, and `load` times the experts'
    computation."""
    ranks, hot = load
    slow = times | {op: hot * times[op] for op in (*TRANSFERS, "experts")}
    order = order_of([schedule])
    for each in (order, mirror(order)):
        of_ranks = play(each, [times], [[hot_rank(hot, ranks)]])
        expected = elapsed(play(each, [slow])[0])
        assert max(map(elapsed, of_ranks)) == pytest.approx(expected, abs=1e-9)


def test_a_link_carries_one_transfer_after_another():
    """Two ranks, and rank 1's experts get nothing: dispatch fills one direction of the link,
    combine the other. No combine runs beside a dispatch.

    link          dispatch 20   dispatch 20   combine 20    combine 20
    rank 0                      experts 8     experts 8
                  0             20    28      40    48      60        80
    """
    times = {"dispatch": 10.0, "experts": 4.0, "combine": 10.0}
    order = order_of([Schedule("top_k", chunks=2)])
    busy, idle = play(order, [times], [[hot_rank(2.0, 2)] * 2])
    spans = [(span.operator, span.start, span.end) for span in busy if span.end > span.start]
    assert spans == [
        *(
            ("dispatch", 0.0, 20.0),
            ("dispatch", 20.0, 40.0),
            ("experts", 20.0, 28.0),
            ("combine", 40.0, 60.0),
        ),
        *(("experts", 40.0, 48.0), ("combine", 60.0, 80.0)),
    ]
    assert elapsed(idle) == elapsed(busy) and all(
        span.start == span.end for span in idle if span.operator == "experts"
    )
    backward = play(mirror(order), [times], [[hot_rank(2.0, 2)] * 2])
    assert elapsed(backward[0]) == 80.0


def test_a_transfer_waits_for_the_rank_that_launches_last():
    """The experts of rank 0 have no rows."""
    times = {"experts": 3.0, "combine": 5.0, "decode": 1.0}
    load = [[Share(1.0, 1.0, 0.0), Share(1.0, 1.0, 1.0)]]
    early, _ = play(order_of([Schedule("top_k")]), [times], [load])
    ran = {span.operator: (span.start, span.end) for span in early}
    assert ran["experts"] == (0.0, 0.0)
    assert ran["combine"] == (3.0, 8.0)
    assert ran["decode"] == (8.0, 9.0)


# time of sequential top-2 with even rows over that of the schedule, of forward and of a training
# step, at rank 0's load
LOADS = (1.0, 1.3, 1.7, 2.0)
# of a program that played the same ranks; medians of its measurements were within 4 %
PROTOTYPE = {
    Schedule("top_k"): ((1.00, 1.00), (0.84, 0.86), (0.69, 0.72), (0.61, 0.64)),
    Schedule("shared_expert"): ((1.47, 1.39), (1.29, 1.24), (1.10, 1.09), (1.00, 1.00)),
    Schedule("scmoe", "pos1", 1): ((1.82, 1.63), (1.61, 1.49), (1.33, 1.31), (1.19, 1.21)),
    Schedule("scmoe", "pos2", 1): ((1.82, 1.63), (1.65, 1.50), (1.43, 1.35), (1.26, 1.24)),
    Schedule("scmoe", "pos3", 2): ((2.13, 1.75), (2.06, 1.70), (1.85, 1.59), (1.58, 1.47)),
}


@pytest.mark.parametrize("schedule", PROTOTYPE, ids=str)
def test_speed_ups_under_load_are_those_of_the_prototype(schedule):
    """It allows 0.01 for rounding, and for backward that begins on each rank when forward has ended
    there."""
    top_2 = Schedule("top_k")
    even = step_ms(top_2, hot_rank(1.0, 2), sequential=True)
    for load, expected in zip(LOADS, PROTOTYPE[schedule], strict=True):
        own = step_ms(schedule, hot_rank(load, 2), schedule == top_2)
        assert [e / o for e, o in zip(even, own, strict=True)] == pytest.approx(
            expected, abs=0.0151
        ), load


@given(st.lists(SCHEDULES, min_size=1, max_size=3))
def test_forward_beside_backward_keeps_the_order_of_both(schedules):
    both = beside_backward(schedules)
    forward = order_of(schedules)
    assert [action for action in both if action.half == 0] == list(forward)
    of_backward = [action for action in both if action.half == 1]
    layers = len(schedules)
    moved = [action._replace(half=0, layer=action.layer - layers) for action in of_backward]
    assert moved == mirror(forward)
    assert both[0].half == 1
