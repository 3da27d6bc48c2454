"""A link with a token bucket carries at most its burst more than its rate allows."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.predict.batches import InFlight
from scmoe.predict.shared_link import SharedLink, Sum, TokenBucket, Waiting
from scmoe.predict.simulated_step import Block, StepSetting, simulate_forward, simulate_step
from scmoe.schedule.cost import OperatorTimes, play_block
from scmoe.schedule.play import LAUNCH, TRANSFERS, Share, elapsed, order_of, play
from scmoe.schedule.schedule import Schedule

SECONDS = st.floats(0.0, 10.0).map(lambda seconds: round(seconds, 3))


@pytest.mark.parametrize(
    ("begin", "duration", "longer"),
    [
        pytest.param(0.0, 5.0, -2.0, id="a whole burst is saved at the start"),
        pytest.param(0.0, 1.0, -1.0, id="a small transfer passes at once"),
        pytest.param(9.0, 5.0, -2.0, id="no more than a burst is saved"),
    ],
)
def test_a_transfer_after_an_idle_time_is_shorter_by_what_was_saved(begin, duration, longer):
    assert TokenBucket(2.0).meets(begin, duration) == longer


def test_a_transfer_that_is_queued_takes_its_time_and_idle_time_is_saved_again():
    link = TokenBucket(2.0)
    assert link.meets(0.0, 5.0) == -2.0  # until 3
    assert link.meets(3.0, 5.0) == 0.0  # until 8
    assert link.meets(8.5, 5.0) == -0.5


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1), SECONDS)
def test_no_time_carries_more_than_itself_and_a_burst(gaps_and_durations, burst):
    link = TokenBucket(burst)
    time = 0.0
    carried = []  # begin, end, seconds at the link's rate
    for gap, duration in gaps_and_durations:
        begin = time + gap
        time = begin + duration + link.meets(begin, duration)
        assert time >= begin - 1e-9
        carried.append((begin, time, duration))
    for first in range(len(carried)):
        begin = carried[first][0]
        seconds = 0.0
        for _, end, duration in carried[first:]:
            seconds += duration
            assert seconds <= end - begin + burst + 1e-9


def test_sums_leave_nothing_saved():
    link = SharedLink([], 1, 1, [Waiting(0.0, 3.0)], TokenBucket(2.0))
    assert link.meets(4.0, 5.0) == -1.0, "the sum ended at 3"
    link = SharedLink([], 1, 1, [Waiting(0.0, 3.0)], TokenBucket(2.0))
    assert link.meets(1.0, 5.0) == 2.0, "two seconds of the sum are left, and nothing is saved"
    assert link.meets(8.0, 1.0) == 0.0, "right behind"


PAIR = {"before": 3.0, "route": 1.0, "dispatch": 4.0, "experts": 2.0, "combine": 4.0}
TIMES = OperatorTimes(PAIR, PAIR)


@pytest.mark.parametrize("burst", [0.0, 0.5, 2.0])
def test_each_transfer_of_blocks_that_wait_for_it_is_shorter_by_a_burst(burst):
    """Between two transfers a rank computes for 2 s or longer."""
    blocks = [Block(Schedule("top_k"), TIMES)] * 2
    setting = StepSetting(sequential=True, burst=burst)
    forward = simulate_forward(blocks, setting)
    assert forward.total == pytest.approx(2 * (14.0 - 2 * burst))
    assert forward.exposed_rows == pytest.approx(2 * (8.0 - 2 * burst))
    assert simulate_step(blocks, setting).total == pytest.approx(2 * forward.total)


def test_what_a_block_leaves_in_the_bucket_is_there_in_the_next_one():
    """From a combine's end to the next dispatch a link is idle for 4 s, less than a burst of 6."""
    long = {operator: 10.0 if operator in TRANSFERS else t for operator, t in PAIR.items()}
    blocks = [Block(Schedule("top_k"), OperatorTimes(long))] * 2
    shorter = 6.0 + 2.0 + 4.0 + 2.0
    total = simulate_forward(blocks, StepSetting(sequential=True, burst=6.0)).total
    assert total == pytest.approx(2 * 26.0 - shorter)


def test_sums_between_two_blocks_leave_nothing_in_the_bucket():
    """A sum of 3 s is ready a second after a transfer and ends right before the next one."""
    last = replace(Block(Schedule("top_k"), TIMES), sums=[Sum(3.0, "route")])
    first = Block(Schedule("top_k"), TIMES)
    setting = StepSetting(sequential=True, burst=2.0)
    step = simulate_step([first, last], setting)
    without = simulate_step([first, replace(last, sums=[])], setting)
    assert step.total == pytest.approx(without.total + 2.0)


@pytest.mark.parametrize("batches", [InFlight.ONE, InFlight.HALVES])
def test_bytes_that_pass_at_once_take_as_much_processor_time_as_others(batches):
    """All transfers are hidden, with a burst and without one."""
    short = PAIR | {"dispatch": 1.0, "combine": 1.0, "mlp": 5.0, "attention": 5.0}
    blocks = [Block(Schedule("scmoe", "pos2"), OperatorTimes(short, short))] * 2
    steps = [
        simulate_step(blocks, StepSetting(batches=batches, tax=0.1, burst=burst))
        for burst in (0.0, 0.5)
    ]
    assert steps[0].exposed_rows == steps[1].exposed_rows == 0.0
    assert steps[1].slowed == pytest.approx(steps[0].slowed)


def test_with_two_batches_in_flight_queued_transfers_save_nothing():
    """The link is never idle between its first and its last transfer."""
    blocks = [Block(Schedule("top_k"), OperatorTimes(PAIR | {"dispatch": 40.0, "combine": 40.0}))]
    without, with_burst = (
        simulate_forward(blocks, StepSetting(batches=InFlight.HALVES, burst=burst))
        for burst in (0.0, 2.0)
    )
    assert without.total - with_burst.total == pytest.approx(2.0)


def test_a_launch_is_computed_before_its_transfer_begins():
    schedule = Schedule("scmoe", "pos2")
    times = dict.fromkeys(schedule.operators(), 1.0) | {LAUNCH: 0.25}
    spans = play_block(schedule, times)
    for launch, transfer in pairwise(spans):
        if transfer.operator in TRANSFERS:
            assert (launch.operator, launch.end - launch.start) == (LAUNCH, 0.25)
            assert transfer.start == launch.end
    without = {operator: t for operator, t in times.items() if operator != LAUNCH}
    assert elapsed(spans) == pytest.approx(elapsed(play_block(schedule, without)) + 0.5)
    order = order_of([schedule], batches=2)
    both = [elapsed(play(order, [each])[0]) for each in (without, times)]
    assert both[1] == pytest.approx(both[0] + 4 * 0.25)


def test_each_piece_of_a_transfer_has_a_launch():
    times = OperatorTimes(PAIR | {LAUNCH: 0.25})
    block = Block(Schedule("top_k", chunks=2), times, fixed=OperatorTimes({LAUNCH: 0.25}))
    for batches in (InFlight.ONE, InFlight.HALVES):
        setting = StepSetting(batches=batches, longer=3.0)
        computed = sum(PAIR[operator] for operator in ("before", "route", "experts"))
        longer = 3.0 if batches is InFlight.HALVES else 1.0
        launches = 2 * 2 * batches.number * 0.25
        played = simulate_forward([block], setting)
        assert played.computing == pytest.approx(longer * computed + launches)


def test_no_span_ends_before_it_begins_where_a_link_has_saved():
    """The busiest rank changes with the chunk."""
    order = order_of([Schedule("top_k", chunks=2)])
    shares = [[Share(0.1, 0.1, 1.0), Share(1.9, 1.9, 1.0)], [Share(0.5, 0.5, 1.0)] * 2]
    for spans in play(order, [PAIR], [shares], SharedLink([], bucket=TokenBucket(7.0))):
        assert all(span.start <= span.end for span in spans)
