"""Fault 27: a NaN or Inf on one rank stops all ranks before the update."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from experiments.engine.ranks import run_ranks
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.update.guard import Guard
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.modules import LanguageModel
from scmoe.training.muon import adamw
from tests.support.failing import failure
from tests.support.trainer_of import trainer_of
from tests.support.trainings import tiny

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


class Poisoned(LanguageModel):
    """In step 1, rank `bad` of this model has a NaN or Inf at one place."""

    place, bad = "", 1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        self.weights = [p.detach().clone() for p in self.parameters()]
        here = batch_idx == 1 and self.wire.mesh.rank == self.bad
        block, value = self.model.blocks[0], float("inf") if "inf" in self.place else float("nan")
        hooks = []
        if here and self.place.startswith("output"):
            target = block.moe.experts
            hooks.append(target.register_forward_hook(lambda m, a, out: out * value, prepend=True))
        if here and self.place.startswith("backward"):
            block.tap_norm.register_full_backward_pre_hook(lambda m, g: (g[0] * value,))
        result = super().training_step(batch, batch_idx)
        for hook in hooks:
            hook.remove()
        if here and self.place.startswith("loss"):
            # leaves all gradients as they are
            result["loss"] = result["loss"] + torch.tensor(value)
        return result


class NotClipped(Poisoned):
    """This module leaves clipping to a Trainer that does not clip, as many modules do."""

    configure_gradient_clipping = LightningModule.configure_gradient_clipping


class ByHand(Poisoned):
    """This module steps its optimizer itself, and clips before that if `clip` is given."""

    def __init__(self, *args: Any, clip: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization, self.clip = False, clip

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        result, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(result["loss"])  # type: ignore[arg-type]
        if self.clip is not None:
            self.clip_gradients(
                optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm"
            )  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        return result


class PastTheStrategy(Poisoned):
    """This module clips by the norm of this rank's parameters alone."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


CLIPS = {
    "by the module": Poisoned,
    "not at all": NotClipped,
    "by value": NotClipped,
    "by hand": ByHand,
    "past the strategy": PastTheStrategy,
}


UNCHANGED, CHANGED = (f"weights as they were: {same}" for same in (True, False))


def poison(rank: int, world_size: int, place: str, clip: str = "by the module") -> None:
    config = tiny(f"position=pos2 trainer.accumulate=1 strategy.ep_size={world_size}", world_size)
    module = CLIPS[clip](lambda wire: build_model(config, wire), max_steps=3)
    module.place, module.bad = place, world_size - 1
    trainer = trainer_of(config, [DataPosition()], [])
    if clip == "by value":
        trainer.gradient_clip_val, trainer.gradient_clip_algorithm = (
            0.5,
            GradClipAlgorithmType.VALUE,
        )
    try:
        trainer.fit(module, build_datamodule(config))
    except (FloatingPointError, RuntimeError) as error:
        same = all(
            torch.equal(p, old) for p, old in zip(module.parameters(), module.weights, strict=True)
        )
        error.add_note(f"weights as they were: {same}")
        raise


PLACES = {
    "output": "output of model.blocks.0.moe.experts",
    "output inf": "output of model.blocks.0.moe.experts",
    "backward": "gradient into model.blocks.0.tap_norm",
    "loss": "loss",
    "loss inf": "loss",
}


REPRESENTATIVE = pytest.mark.representative


@pytest.mark.parametrize(
    ("place", "clip"),
    [
        *(
            pytest.param(place, "by the module", marks=REPRESENTATIVE)
            for place in ("output", "backward")
        ),
        *((place, "by the module") for place in ("output inf", "loss", "loss inf")),
        *(("output", clip) for clip in ("not at all", "by value", "by hand")),
        pytest.param("loss inf", "by hand", marks=REPRESENTATIVE),
    ],
)
def test_a_number_that_is_not_finite_stops_all_ranks_before_the_update(place, clip):
    """Modules are watched however they clip, and if they step by hand."""
    message = failure(poison, 2, place, clip, all_fail=clip == "by the module")
    assert re.search(
        rf"first not finite: (rank 0: [^;]*; )?rank 1: {re.escape(PLACES[place])}", message
    ), message
    assert UNCHANGED in message and CHANGED not in message
    if clip == "by the module":
        assert message.count(UNCHANGED) == 2, message


def clipped(rank: int, world_size: int, by_hand: bool, clip: float | None) -> list[Tensor]:
    """Return the trained weights, clipped by the module itself or by the Trainer."""
    config = tiny(f"position=pos2 trainer.accumulate=1 strategy.ep_size={world_size}", world_size)
    cls, own = (ByHand, {"clip": clip}) if by_hand else (NotClipped, {})
    module = cls(
        lambda wire: build_model(config, wire),
        max_steps=3,
        make_optimizer=partial(adamw, lr=0.01),
        **own,
    )
    trainer = trainer_of(config, [DataPosition()], [])
    if not by_hand:
        trainer.gradient_clip_val = clip
    trainer.fit(module, build_datamodule(config))
    return [p.detach().clone() for p in module.parameters()]


def test_clipping_by_hand_uses_the_global_norm():
    by_hand, by_trainer, not_clipped = (
        run_ranks(clipped, 2, *how) for how in ((True, 0.05), (False, 0.05), (True, None))
    )
    for a, b, c in zip(by_hand, by_trainer, not_clipped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_module_that_clips_by_other_means_is_refused(world_size):
    message = failure(poison, world_size, "", "past the strategy")
    assert (
        "RuntimeError: PastTheStrategy.configure_gradient_clipping did not call self.clip_gradients"
        in message
    )
    assert (
        "call self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm) there"
        in message
    )
    assert UNCHANGED in message and CHANGED not in message


def test_one_process_stops_too():
    assert "first not finite: rank 0: output of model.blocks.0.moe.experts" in failure(
        poison, 1, "output"
    )


def test_good_steps_keep_nothing_and_start_no_collective():
    module = nn.Sequential(nn.Linear(2, 2))
    guard = Guard(module)
    with patch.object(dist, "all_gather_object") as gather:
        for _ in range(3):
            module(torch.ones(1, 2)).sum().backward()
            guard.note_loss(torch.tensor(1.0))
            assert float(guard.loss_as_zero()) == 0.0
            assert len(guard.trace) == 3
            guard.check(torch.tensor(1.0), Mesh())
            assert guard.trace == {}
    assert not gather.called


def test_a_weight_that_is_a_modules_output_gets_no_hook_a_step():
    table = nn.Module()
    table.weight = nn.Parameter(torch.ones(2))
    table.forward = lambda: table.weight
    Guard(nn.Sequential(table))
    for _ in range(3):
        table().sum().backward()
    assert not table.weight._backward_hooks


@pytest.mark.representative
def test_batches_without_a_check_keep_no_more_than_one_batch():
    """Optimizers may be stepped past Lightning, which then calls no check. A NaN among many losses
    is remembered."""
    module = nn.Sequential(nn.Linear(2, 2))
    guard = Guard(module)
    for loss in (1.0, math.nan, 1.0):
        module(torch.ones(1, 2)).sum().backward()
        guard.note_loss(torch.tensor(loss))
    assert len(guard.trace) == 3 and torch.as_tensor(guard.loss_as_zero()).isnan()
