"""The simulated step keeps its laws."""

from dataclasses import replace
from itertools import product

import pytest

from scmoe.predict.batches import InFlight
from scmoe.predict.shared_link import Sum
from scmoe.predict.simulated_step import Block, Head, StepSetting, simulate_forward, simulate_step
from scmoe.schedule.cost import OperatorTimes, computing_time, elapsed_time
from scmoe.schedule.play import BEFORE, EVEN, TRANSFERS, Share, slowest_ranks
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.stack import half_of, stack_time

FORWARD = {
    **{BEFORE: 3.0, "route": 0.1, "encode": 0.2, "dispatch": 2.0, "experts": 3.0},
    **{"combine": 2.0, "decode": 0.2, "attention": 2.0, "mlp": 1.5, "shared_expert": 1.5},
}
BACKWARD = {op: t * (1 if op in TRANSFERS else 2) for op, t in FORWARD.items()}
TIMES = OperatorTimes(FORWARD, BACKWARD)
POSITIONS = [Schedule("scmoe", position) for position in ("pos1", "pos2", "pos3")]
SCHEDULES = [
    *(Schedule("top_k", chunks=chunks) for chunks in (1, 2)),
    Schedule("shared_expert"),
    *POSITIONS,
    Schedule("scmoe", "pos2", 1, 2),
]
BEFORE_S = FORWARD[BEFORE] + BACKWARD[BEFORE]


def scaled(times: OperatorTimes, factor: float, operators=TRANSFERS) -> OperatorTimes:
    return OperatorTimes(
        *(
            {op: t * (factor if op in operators else 1) for op, t in each.items()}
            for each in (times.forward, times.backward)
        )
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_pair_takes_what_the_timeline_says(schedule):
    step = simulate_step([Block(schedule, TIMES)], StepSetting())
    assert step.total == pytest.approx(elapsed_time(schedule, TIMES) + BEFORE_S)
    assert step.computing == pytest.approx(computing_time(schedule, TIMES) + BEFORE_S)
    three = simulate_step([Block(schedule, TIMES)] * 3, StepSetting(accumulate=2), Head(1.0, 2.0))
    assert three.total == pytest.approx(2 * (3 * step.total + 3))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_halves_take_what_the_stack_says(schedule):
    step = simulate_step([Block(schedule, TIMES)] * 3, StepSetting(batches=InFlight.HALVES))
    layers = [(schedule, half_of(TIMES))] * 3
    assert step.total == pytest.approx(stack_time(layers, 2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_with_free_transfers_all_ways_take_as_long(schedule):
    free = Block(schedule, scaled(TIMES, 0.0))
    ways = [
        StepSetting(),
        StepSetting(sequential=True),
        StepSetting(batches=InFlight.HALVES),
        StepSetting(tax=0.5),
    ]
    totals = [simulate_step([free] * 3, way).total for way in ways]
    assert totals == pytest.approx([totals[0]] * len(ways))


def test_whole_batches_beside_each_other_take_forward_and_backward_alone_once():
    """Blocks whose forward and backward take 1 and 2, beside transfers of 0.25: each is hidden by
    the other batch. The first forward and the last backward wait for all of theirs."""
    forward = {BEFORE: 0.5, "dispatch": 0.25, "experts": 0.5, "combine": 0.25}
    backward = {
        operator: (1 if operator in TRANSFERS else 2) * t for operator, t in forward.items()
    }
    blocks = [Block(Schedule("top_k"), OperatorTimes(forward, backward))] * 3
    whole = StepSetting(InFlight.WHOLE, accumulate=4)
    step = simulate_step(blocks, whole)
    assert step.computing == pytest.approx(4 * 3 * 3)
    alone = 2 * 3 * 0.5
    ends = 3 * 2 * 0.25  # both batches of a pair end a pass with a transfer
    assert alone <= step.exposed_rows <= alone + ends
    in_stages = simulate_step(blocks, replace(whole, stages=3, virtual_stages=2))
    assert in_stages.total == pytest.approx(step.total + 2 / 2 * (3 * 3 + 2 * 3 * 0.5))
    with pytest.raises(ValueError, match="two at a time"):
        StepSetting(InFlight.WHOLE, accumulate=1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_whole_batches_take_as_long_as_one_where_transfers_are_free(schedule):
    free = [Block(schedule, scaled(TIMES, 0.0), (Sum(1.0, BEFORE),))] * 3
    one = simulate_step(free, StepSetting(accumulate=3), Head(1.0, 2.0))
    whole = simulate_step(free, StepSetting(InFlight.WHOLE, accumulate=3), Head(1.0, 2.0))
    assert whole.total == pytest.approx(one.total)


def test_with_an_infinite_link_all_positions_take_as_long():
    """Their sub-layers before the tap and after it are the same ones."""
    total = []
    for schedule in POSITIONS:
        inside = sum(FORWARD[op] for op in schedule.window)
        before = 2 * FORWARD["attention"] + FORWARD["mlp"] + FORWARD["shared_expert"] - inside
        forward = {**FORWARD, BEFORE: before}
        backward = {**BACKWARD, BEFORE: 2 * before}
        block = Block(schedule, scaled(OperatorTimes(forward, backward), 0.0))
        total.append(simulate_step([block] * 2, StepSetting()).total)
    assert total == pytest.approx([total[0]] * 3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_faster_link_never_slows(schedule):
    sums = (Sum(1.0, BEFORE, 0.5), Sum(1.0, BEFORE), Sum(2.0, "experts"))
    for way in (
        StepSetting(),
        StepSetting(sequential=True),
        StepSetting(batches=InFlight.HALVES, tax=0.2),
    ):
        totals = [
            simulate_step([Block(schedule, scaled(TIMES, f), sums)] * 3, way).total
            for f in (2.0, 1.0, 0.5, 0.25, 0.0)
        ]
        assert totals == sorted(totals, reverse=True)


def test_gradients_without_bytes_add_nothing_and_those_of_the_first_block_are_exposed():
    block = Block(SCHEDULES[0], TIMES)
    plain = simulate_step([block] * 2, StepSetting(accumulate=3))
    nothing = replace(block, sums=(Sum(0.0, BEFORE), Sum(0.0, "experts")))
    assert simulate_step([nothing] * 2, StepSetting(accumulate=3)) == plain
    last = replace(block, sums=(Sum(0.25, BEFORE),))
    # ready at the very end of backward; those of the later block are hidden
    summed = simulate_step([last] * 2, StepSetting(accumulate=3))
    assert summed.exposed_gradients == pytest.approx(0.25)
    assert summed.total == pytest.approx(plain.total + 0.25)


@pytest.mark.parametrize("batches", [InFlight.ONE, InFlight.HALVES])
def test_the_heads_sums_are_carried_once(batches):
    """They are all hidden, and computing is slowed by their time at a tax of 1."""
    blocks = [Block(SCHEDULES[0], scaled(TIMES, 0.0))] * 2
    way = StepSetting(batches=batches, tax=1.0)
    plain = simulate_step(blocks, way, Head(1.0, 2.0))
    summed = simulate_step(blocks, way, Head(1.0, 2.0, [Sum(0.7, "head")]))
    assert summed.slowed == pytest.approx(plain.slowed + 0.7)


def test_an_operator_that_the_window_has_twice_has_two_sums():
    block = Block(POSITIONS[2], scaled(TIMES, 0.0), (Sum(100.0, "attention"),))
    twice = simulate_step([block], StepSetting())
    assert 100 < twice.exposed_gradients < 200


def test_chunks_and_halves_pay_launches_and_weights_again():
    fixed = OperatorTimes({"experts": 0.5, "dispatch": 0.1}, {"experts": 1.0, "dispatch": 0.1})
    least = OperatorTimes({"experts": 2.0}, {"experts": 4.0})
    for schedule, way in (
        (SCHEDULES[1], StepSetting()),
        (SCHEDULES[0], StepSetting(batches=InFlight.HALVES)),
    ):
        plain = simulate_step([Block(schedule, TIMES)], way)
        block = Block(schedule, TIMES, (), fixed, least)
        paid = simulate_step([block], way)
        # forward: two pieces of 2 + 0.5 in place of 3; backward twice that
        assert paid.computing == pytest.approx(plain.computing + 3 * (2 * 2.5 - 3))
    whole = simulate_step([Block(SCHEDULES[0], TIMES, (), fixed, least)], StepSetting())
    assert whole == simulate_step([Block(SCHEDULES[0], TIMES)], StepSetting())


def test_the_tax_is_a_share_of_what_is_hidden():
    block = Block(Schedule("scmoe", "pos3", 2), TIMES)  # hides all: 4 of each direction
    taxed = simulate_step([block], StepSetting(tax=0.1))
    assert taxed.exposed_rows == pytest.approx(0.0)
    assert taxed.slowed == pytest.approx(0.1 * 8)
    assert simulate_step([Block(SCHEDULES[0], TIMES)], StepSetting(tax=0.1)).slowed == 0.0


def test_a_pipeline_waits_for_batches_that_transfers_slow_too():
    """With equal stages a step takes as many passes more as there are other stages."""
    blocks = [Block(Schedule("scmoe", "pos3", 2), TIMES)] * 2
    for simulate in (simulate_step, simulate_forward):
        alone, in_stages = (
            simulate(blocks, StepSetting(stages=stages, tax=0.1)) for stages in (1, 3)
        )
        assert in_stages.total == pytest.approx(3 * alone.total)


@pytest.mark.parametrize(
    ("schedule", "batches"), [*product(SCHEDULES, (InFlight.ONE, InFlight.HALVES))], ids=str
)
def test_even_loads_change_nothing_and_uneven_ones_cost(schedule, batches):
    blocks = [Block(schedule, TIMES)] * 2
    way = StepSetting(batches=batches)
    even = simulate_step(blocks, way)
    loads = [[[EVEN] * 3] * schedule.chunks] * 2
    assert simulate_step(blocks, way, loads=loads).total == pytest.approx(even.total)
    hot = [[[Share(1.0, 1.7, 1.7), Share(1.0, 0.65, 0.65)]] * schedule.chunks] * 2
    assert simulate_step(blocks, way, loads=hot).total > even.total + 2 * 3 * 0.7
    forward = simulate_forward(blocks, way, loads=hot).total
    assert 0 < forward < simulate_step(blocks, way, loads=hot).total


def test_only_ranks_that_may_be_the_slowest_are_played():
    load = [[Share(1, 1, 1), Share(1, 2, 2), Share(2, 1, 1), Share(1, 1, 1)]]
    assert slowest_ranks([load] * 2) == [[[Share(1, 2, 2), Share(2, 1, 1)]]] * 2


def test_transfers_that_are_waited_for_at_once_hide_nothing():
    with pytest.raises(ValueError, match="two batches"):
        StepSetting(batches=InFlight.HALVES, sequential=True)


def test_a_prompt_s_pass_goes_through_all_stages():
    """The head is in the last one alone."""
    blocks = [Block(POSITIONS[1], TIMES)] * 2
    alone, in_stages = (
        simulate_forward(blocks, StepSetting(stages=stages), Head(1.0, 2.0)) for stages in (1, 3)
    )
    assert in_stages.total == pytest.approx(3 * (alone.total - 1.0) + 1.0)
