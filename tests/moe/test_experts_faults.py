"""Faults 17 and 26: a buffer in flight, and a collapsed router.
tests/parallel/test_ep_equality.py has 20 to 25: gradients and seeds are those of one process.
"""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.parallel.wire.all_to_all import Transfer
from scmoe.training.callbacks.collapse import PATIENCE
from scmoe.training.callbacks.expert_load import ExpertLoad
from tests.support.trainings import RecordingModel, fit, tiny

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

# ---------------------------------------------------------------------- a buffer in flight

POISON = 7.0


class LazyWork:
    """This transfer reads the sender's buffer at the wait and not before, and keeps neither buffer
    alive."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = weakref.ref(target), weakref.ref(source)

    @torch.no_grad()
    def wait(self) -> None:
        gc.collect()
        source, target = self.source(), self.target()
        assert source is not None and target is not None, "a buffer was freed before the wait"
        target.copy_(source)


def lazily(rows: Tensor, traffic: None) -> tuple[Tensor, LazyWork]:
    target = torch.full_like(rows, POISON)
    return target, LazyWork(target, rows)


@pytest.mark.representative
def test_buffers_are_held_until_the_wait_and_no_longer():
    """This holds in forward and backward. The caller drops its rows at once, and new tensors take
    the free memory."""
    x = torch.randn(8, 4, requires_grad=True)
    transfer = Transfer(lazily).start(2 * x)
    sources = [weakref.ref(transfer.source)]
    held = [torch.full((8, 4), POISON) for _ in range(16)]
    received = transfer.wait()
    assert torch.equal(received, 2 * x)
    gc.collect()
    assert transfer.source is None and sources[0]() is None

    (received * torch.arange(4.0)).sum().backward()
    assert torch.equal(x.grad, (2 * torch.arange(4.0)).expand(8, 4))
    assert transfer.source is None and len(held) == 16


# -------------------------------------------------- a router with extreme logits


class Rigged(RecordingModel):
    """For every token, expert 0 gets the logit 20, the last expert its negative, the others 0."""

    @torch.no_grad()
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            for block in self.model.blocks:
                block.tap_norm.weight.zero_()
                block.tap_norm.bias.zero_()
                block.tap_norm.bias[0] = 1.0
                block.moe.router.gate.weight.zero_()
                block.moe.router.gate.weight[0, 0], block.moe.router.gate.weight[-1, 0] = (
                    20.0,
                    -20.0,
                )


def collapse(rank: int, world_size: int) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of the last step, and the warnings of a collapse."""
    steps = PATIENCE + 1
    words = (
        f"position=pos2 strategy.ep_size=2 trainer.max_steps={steps} trainer.log_every=1"
        " optim.lr=1e-6"
    )
    config = tiny(words, world_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(config, ExpertLoad(), module=Rigged(config))
    said = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    return {
        name: float(value) for name, value in trainer.callback_metrics.items() if "moe/" in name
    }, said


def test_a_collapsed_router_is_measured_and_named():
    (metrics, said), (others, silent) = run_ranks(collapse, 2)
    assert metrics == others, "metrics count the tokens of all ranks"
    assert (metrics["moe/load_max"], metrics["moe/load_entropy"], metrics["moe/dead_experts"]) == (
        8.0,
        0.0,
        7.0,
    )
    assert [line.partition(" gets ")[0] for line in said] == [
        "MoE layer 0: the router has collapsed, expert 0"
    ]
    assert not silent, "only rank 0 warns"
