"""The step of the benches gives the gradients of one process; tests/conform/test_own.py asks the
Strategy and `data_parallel`."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import scmoe
from experiments.engine.ranks import run_ranks
from experiments.engine.step import Step
from scmoe.moe.experts import Experts
from scmoe.parallel.mesh import Mesh, build_mesh
from scmoe.parallel.update.wrap import Wrapped, wrap
from scmoe.parallel.wire.wire import Wire

DIM, EXPERTS, RANKS = 8, 4, 2
pytestmark = pytest.mark.ranks


class Model(nn.Module):
    """A block whose weights are drawn by their names, so they are equal on any number of ranks."""

    def __init__(self, group: object = None) -> None:
        super().__init__()
        self.group, self.block = group, scmoe.ScMoEBlock(DIM, 2, EXPERTS, top_k=2, group=group)
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, Experts):
                module.init_weights("experts", 0.2, 0.2)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.2, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.double()

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD, stats = self.block(x_BSD)
        return y_BSD.square().mean() + 0.1 * scmoe.load_balance_loss([stats], self.group)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name; of experts those that this rank holds."""
    return {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def batch() -> Tensor:
    """[ranks, B, S, D]"""
    return torch.randn(
        RANKS, 2, 4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def of_the_benches(rank: int, world_size: int) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    wire = Wire(build_mesh(world_size, torch.device("cpu"), timedelta(seconds=60)))
    model = Model(wire)
    wrapped = wrap(model, wire.mesh)
    step = Step(wrapped, wire.mesh)
    step.backward(step.model(batch()[rank]))
    found = gradients(model)
    wrapped.close()
    return found


def test_the_step_of_the_benches_gives_the_gradients_of_one_process():
    model = Model()
    step = Step(Wrapped(model, 1), Mesh())
    step.backward(step.model(batch().flatten(0, 1)))
    expected = gradients(model)
    for rank, found in enumerate(run_ranks(of_the_benches, RANKS)):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            whole = expected[name]
            if gradient.shape != whole.shape:  # this rank's experts
                whole = whole.chunk(RANKS)[rank]
            assert torch.allclose(gradient, whole, rtol=1e-10, atol=1e-12), name
