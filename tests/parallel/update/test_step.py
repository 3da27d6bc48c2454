"""All callers of a step give the gradients of one process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import scmoe
from experiments.engine.ranks import run_ranks
from scmoe.moe.experts import Experts
from scmoe.parallel.mesh import Mesh, build_mesh
from scmoe.parallel.update.step import Step
from scmoe.parallel.update.wrap import Wrapped, wrap
from scmoe.parallel.wire.wire import Wire
from tests.support.trainings import users_trainer

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


class Module(LightningModule):
    def configure_model(self) -> None:
        self.model = Model(self.wire)

    def training_step(self, x_BSD: Tensor, _: int) -> Tensor:
        return self.model(x_BSD)

    def on_before_optimizer_step(self, optimizer: object) -> None:
        self.found = gradients(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


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


def of_all_callers(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    x_BSD, module = batch()[rank], Module()
    trainer = users_trainer(world_size, scmoe.ExpertParallelStrategy(), max_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader([x_BSD], batch_size=None))
    found = {"Strategy": module.found}
    model = Model(dist.group.WORLD)
    ddp = scmoe.data_parallel(model, dist.group.WORLD)
    ddp(x_BSD).backward()
    found["data_parallel"] = gradients(model)
    wire = Wire(build_mesh(world_size, torch.device("cpu"), timedelta(seconds=60)))
    model = Model(wire)
    wrapped = wrap(model, wire.mesh)
    step = Step(wrapped, wire.mesh)
    step.backward(step.model(x_BSD))
    found["Step"] = gradients(model)
    wrapped.close()
    return found


def test_all_callers_give_the_gradients_of_one_process():
    model = Model()
    step = Step(Wrapped(model, 1), Mesh())
    step.backward(step.model(batch().flatten(0, 1)))
    expected = gradients(model)
    of_ranks = run_ranks(of_all_callers, RANKS)
    for rank, callers in enumerate(of_ranks):
        for caller, found in callers.items():
            assert found.keys() == expected.keys(), caller
            for name, gradient in found.items():
                whole = expected[name]
                if gradient.shape != whole.shape:  # this rank's experts
                    whole = whole.chunk(RANKS)[rank]
                assert torch.allclose(gradient, whole, rtol=1e-10, atol=1e-12), f"{caller}: {name}"
