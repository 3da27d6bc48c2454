"""The link in backward: sums of gradients fill its gaps, and share it with rows that meet them."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.predict.shared_link import BlockSums, SharedLink, Sum, Waiting
from scmoe.schedule.play import Span

SECONDS = st.floats(0.0, 10.0).map(lambda seconds: round(seconds, 3))


def link_of(*waiting: tuple[float, float], at_once: int = 1) -> SharedLink:
    return SharedLink([], 1, at_once, [Waiting(*each) for each in waiting])


def test_sums_fill_the_gaps_in_the_order_in_which_they_are_ready():
    link = link_of((9.0, 2.0), (0.0, 3.0))
    assert link.meets(4.0, 1.0) == 0.0  # carried from 0 to 3
    assert link.carry_sums(inf) == 11.0
    assert link_of().carry_sums(inf) == 0.0


@pytest.mark.parametrize(("at_once", "later"), [(0, 0.0), (1, 2.0), (2, 4.0), (9, 6.0)])
def test_rows_that_meet_sums_share_the_link_with_them(at_once, later):
    """A transfer of 2 s that begins at 1 s meets 6 s of sums."""
    link = link_of((0.0, 7.0), at_once=at_once)
    assert link.meets(1.0, 2.0) == later
    assert link.carry_sums(inf) == 9.0, "the link is never idle: 7 s of sums and 2 s of rows"


def test_a_sum_that_is_ready_while_rows_travel_waits_for_their_end():
    link = link_of((1.5, 1.0))
    assert link.meets(1.0, 2.0) == 0.0
    assert link.carry_sums(inf) == 4.0


@given(
    st.lists(st.tuples(SECONDS, SECONDS), max_size=6),
    st.lists(st.tuples(SECONDS, SECONDS), max_size=6),
    st.integers(0, 3),
)
def test_the_link_carries_everything_once(waiting, gaps_and_rows, at_once):
    link = link_of(*waiting, at_once=at_once)
    time = 0.0
    for gap, duration in gaps_and_rows:
        time += gap
        later = link.meets(time, duration)
        assert 0 <= later <= at_once * duration + 1e-9
        time += duration + later
    end = max(time, link.carry_sums(inf))
    carried = sum(seconds for _, seconds in waiting) + sum(rows for _, rows in gaps_and_rows)
    idle = sum(gap for gap, _ in gaps_and_rows) + max((ready for ready, _ in waiting), default=0.0)
    assert carried - 1e-6 <= end <= carried + idle + 1e-6
    assert not link.waiting


@pytest.mark.parametrize(
    ("operator", "halves", "pieces"), [("mlp", 1, 1), ("mlp", 2, 2), ("experts", 2, 6)]
)
def test_a_sum_is_ready_with_the_last_piece_of_its_operator(operator, halves, pieces):
    link = SharedLink([BlockSums([Sum(1.0, operator, 0.5)], chunks=3)], halves, 1)
    for piece in range(pieces):
        assert link.summed == 0.0
        link.computed(Span(operator, 2.0 * piece, 2.0 * piece + 2.0, half=piece % halves))
    assert link.waiting == [Waiting(2.0 * pieces - 1.0, 1.0)]


def test_sums_that_are_ready_before_a_pass_are_carried_before_it():
    """The head's backward ends at 0. A transfer at 2 meets no sum."""
    link = SharedLink([], waiting=[Waiting(-1.0, 1.0), Waiting(-0.5, 1.0), Waiting(5.0, 1.0)])
    assert link.summed == 3.0
    assert link.meets(2.0, 1.0) == 0.0
    assert link.waiting == [Waiting(5.0, 1.0)]
