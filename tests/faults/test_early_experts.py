"""Fault 41: experts that are built before the ranks exist, or added after fit has begun, are refused.

Otherwise each rank would train all experts, which drift apart, and a checkpoint would hold them once for each rank.
"""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext
from tests.support.failing import failure

pytestmark = [pytest.mark.dist, pytest.mark.faults, pytest.mark.representative]


def moe(context: ParallelContext) -> MoEStream:
    return MoEStream(Router(16, 8, 1), Experts(16, 32, 8, context.local_experts(8)), context.dispatcher(8))


class Model(LightningModule):
    """when: where the MoE module is built. added: where one more is added."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.parallel_context = when, ParallelContext()
        if when == "in __init__":
            self.moe = moe(self.parallel_context)

    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            self.moe = moe(self.parallel_context)

    def on_train_start(self) -> None:
        if self.when == "added":
            self.more = moe(self.parallel_context)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.moe(batch[0])[0].square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(rank: int, world_size: int, when: str, ep_size: int | None) -> None:
    data = DataLoader(TensorDataset(torch.randn(4, 2, 16)), batch_size=2)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    strategy = ExpertParallelStrategy(ep_size)
    trainer = Trainer(accelerator="cpu", devices=world_size, strategy=strategy, max_steps=1, **quiet)  # type: ignore
    trainer.fit(Model(when), data)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            "in __init__",
            r"ValueError: moe\.experts holds experts 0 to 7 on rank \d, allowed: (0 to 3|4 to 7) of 8; build the model "
            r"in configure_model or setup, from self\.parallel_context",
        ),
        ("added", r"ValueError: more\.experts\.w_in_eDF was added after fit had begun\. Add experts in configure"),
    ],
)
def test_experts_that_the_strategy_cannot_shard_are_refused(when, message):
    assert re.search(message, failure(fit, 2, when, None))


def test_experts_in_configure_model_are_accepted():
    run_ranks(fit, 2, "in configure_model", None)
    run_ranks(fit, 2, "in __init__", 1)  # each rank has all experts, whose gradients are averaged
