"""How a network runs is set in one place, and is as before after a change for now."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.models.run_as import run_as, running_as, schedule_of
from scmoe.moe.dispatcher import Blocking
from scmoe.schedule.schedule import ModelSchedule
from tests.support.models import tiny, tiny_model
from tests.support.two_batches import DROPLESS, run_batches


def test_a_network_without_halves_runs_one_batch():
    """Generation sets one batch in flight for each decode."""
    network = nn.Linear(2, 2)
    with running_as(network, ModelSchedule(())):
        assert schedule_of(network) == ModelSchedule(())
    with pytest.raises(ValueError, match="Linear has no Halves"):
        run_as(network, ModelSchedule((), 2))


class Forwarding(nn.Module):
    """Forwards reads to the network in it, as a PeftModel does."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)


@pytest.mark.parametrize("wrap", [Forwarding, partial(torch.compile, backend="eager")])
def test_a_wrapped_network_runs_as_its_wrapper_is_set(wrap):
    """A wrapper that forwards reads alone must not keep the number for itself."""
    model = tiny_model(tiny(*DROPLESS))
    wrapper = wrap(model)
    two = replace(schedule_of(model), batches_in_flight=2)
    run_as(wrapper, two)
    assert schedule_of(model) == schedule_of(wrapper) == two
    with running_as(wrapper, replace(two, batches_in_flight=1)):
        assert model.halves.batches_in_flight == 1
    assert model.halves.batches_in_flight == 2


def test_a_model_runs_as_before_after_a_change_for_now():
    """Slots, batches in flight and dispatchers, also after an error."""
    model = tiny_model(tiny(*DROPLESS))
    (block,) = moe_blocks_of(model)
    before, dispatcher = schedule_of(model), block.moe.dispatcher
    other = ModelSchedule((replace(block.schedule, expert_slot=0, chunks=2),), 2)
    with pytest.raises(KeyError), running_as(model, other, [Blocking(dispatcher)]):
        assert schedule_of(model) == other
        assert isinstance(block.moe.dispatcher, Blocking)
        raise KeyError
    assert schedule_of(model) == before != other
    assert block.moe.dispatcher is dispatcher


def test_networks_that_run_differently_have_no_common_schedule():
    networks = nn.ModuleList([tiny_model(tiny(*DROPLESS)) for _ in range(2)])
    run_batches(networks[0], 2)
    with pytest.raises(ValueError, match="different numbers of batches"):
        schedule_of(networks)
    run_as(networks, ModelSchedule(2 * schedule_of(networks[0]).blocks, 2))
    assert schedule_of(networks).batches_in_flight == 2
