"""The recorder changes no bit, and sees the operators in the order of the schedule, forward and
backward."""

from unittest.mock import patch

import pytest
import torch

from experiments.bench.emulated import EmulatedExperts, EmulatedOperator
from scmoe.moe.dispatcher import Blocking, LocalDispatcher
from scmoe.moe.recorder import Recorder
from scmoe.moe.router import Router
from scmoe.planning import pricing
from scmoe.planning.pricing import DIRECTIONS, OPERATORS, layer_seconds, measured, noted
from scmoe.schedule.schedule import Schedule
from tests.support.models import DIM, EXPERTS, gradients, randomise, tiny_shortcut, tiny_stream
from tests.support.recording import Log, recorded_shortcut_block

CPU = torch.device("cpu")
SCHEDULES = [
    Schedule("scmoe", "pos1", 2),
    Schedule("scmoe", "pos2", 1),
    Schedule("scmoe", "pos2", 2, chunks=2),
    Schedule("scmoe", "pos3", 0, chunks=3),
    Schedule("scmoe", "pos1", inside_attention=True),
    Schedule("scmoe", "pos3", 0, chunks=2, inside_attention=True),
]


def train(block, recorder):
    torch.manual_seed(3)
    block.run_as(block.schedule, block.moe.dispatcher, recorder)
    generator = torch.Generator().manual_seed(5)
    x_BSD = torch.randn(2, 6, DIM, dtype=torch.float64, generator=generator, requires_grad=True)
    y_BSD, stats = block(x_BSD)
    (y_BSD.square().sum() + stats.score_sums_E[0]).backward()
    return y_BSD, {"x": x_BSD.grad, **gradients(block)}


@pytest.mark.parametrize("noisy", [False, True], ids=["", "noisy"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_recording_changes_no_bit(schedule, noisy):
    """With noise the gate reads its input twice, and encode reads it too, so the order of three
    gradients matters."""
    block = recorded_shortcut_block(schedule, 2.0, Log(), Blocking)
    if noisy:
        block.moe.router = randomise(Router(DIM, EXPERTS, 2, noisy=True).double())
    expected, expected_gradients = train(block, None)
    block.zero_grad()
    actual, actual_gradients = train(block, Recorder(CPU))
    assert torch.equal(actual, expected)
    assert all(torch.equal(actual_gradients[name], g) for name, g in expected_gradients.items())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_operators_are_seen_in_the_order_of_the_schedule(schedule):
    """Each transfer is awaited at once. The pair's other sub-layers run before the tap, in backward
    after it."""
    recorder = Recorder(CPU)
    train(recorded_shortcut_block(schedule, 2.0, Log(), Blocking), recorder)
    forward, backward = ([s.operator for s in recorder.spans(d)] for d in ("forward", "backward"))
    before = ("attention", "mlp", "attention")[: 4 - len(schedule.window)]
    assert forward == [*before, *schedule.operators()]
    assert sorted(backward) == sorted(forward)
    place = {op: backward.index(op) for op in backward}
    assert (
        place["decode"]
        < place["combine"]
        < place["experts"]
        < place["dispatch"]
        < place["encode"]
        < place["route"]
    )
    backbone = [*before, *(op for own in schedule.around_experts for op in own)]
    assert [op for op in backward if op in backbone] == backbone[::-1]


def test_measured_times_are_those_of_the_operators():
    """Emulated operators sleep for at least their time in forward, twice as long in backward."""
    schedule = Schedule("scmoe", "pos2", 1)
    stream = tiny_stream(1, 2.0, Blocking(LocalDispatcher()))
    stream.experts = EmulatedExperts(1000.0, EXPERTS, range(EXPERTS))
    sublayers = [EmulatedOperator(ms) for ms in (1.0, 4.0, 2.0)]
    block = tiny_shortcut(stream, schedule, sublayers, EmulatedOperator(3.0)).double()
    recorder = Recorder(CPU)
    block.run_as(schedule, stream.dispatcher, recorder)
    x_BSD = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
    block(x_BSD).y_BSD.sum().backward()
    with patch.object(pricing, "gather", lambda times, group: times[None]):  # one rank
        times = measured([recorder], [schedule], None).at_layer(0)
    rows = 6 * 2  # slots: capacity 2 of 6 tokens for 6 experts
    least = {
        "mlp": 4e-3,
        "attention": 2e-3,
        "shared_expert": 3e-3,
        "experts": rows * 1e-3,
        "dispatch": 0.0,
    }
    for direction, factor in ((0, 1), (1, 2)):
        for operator, seconds in least.items():
            took = times.operators_dO[direction, OPERATORS.index(operator)]
            assert took >= factor * seconds, operator
        # they run one after another
        assert times.elapsed_d[direction] >= times.operators_dO[direction].sum() * 0.999


@pytest.mark.parametrize("frozen", [False, True], ids=["before the block", "the block too"])
def test_a_block_is_priced_where_all_before_it_is_frozen(frozen):
    """Its backward then ends before the gate, or does not begin."""
    block, recorder = (
        recorded_shortcut_block(Schedule("scmoe", "pos2", 1), 2.0, Log(), Blocking),
        Recorder(CPU),
    )
    block.requires_grad_(not frozen)
    block.sublayers.requires_grad_(False)
    block.tap_norm.requires_grad_(False)
    block.run_as(block.schedule, block.moe.dispatcher, recorder)
    y_BSD = block(torch.randn(2, 6, DIM, dtype=torch.float64)).y_BSD
    (y_BSD.sum() + torch.zeros((), requires_grad=True)).backward()
    times_dN2 = noted(recorder, block.schedule, DIRECTIONS)
    times = layer_seconds(times_dN2[None, None], block.schedule)
    route_d = times.operators_dO[:, OPERATORS.index("route")]
    assert route_d[0] > 0 and times.elapsed_d[0] > 0
    assert route_d[1] == 0 and (times.elapsed_d[1] == 0) == frozen


def test_an_operator_without_a_gradient_is_timed_forward_only():
    recorder = Recorder(CPU)
    block = recorded_shortcut_block(Schedule("scmoe", "pos1", 0), None, Log(), Blocking)
    block.run_as(block.schedule, block.moe.dispatcher, recorder)
    with torch.no_grad():
        block(torch.randn(1, 4, DIM, dtype=torch.float64))
    assert len(recorder.spans("forward")) == len(Schedule("scmoe", "pos1").operators()) + 2
    assert recorder.spans("backward") == []
