"""Fault 12: SIGTERM may come at any time between set-up and teardown.

All ranks end with 143 and save what they have trained. Where ranks cannot ask each other, the
process ends at once. SIGTERM during training is in tests/training/run/test_stop_smoke.py, during
validation in test_stop.py.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from experiments.engine.ranks import RankError, run_ranks
from scmoe.lightning.stop import EXIT_CODE
from scmoe.parallel.checkpoint import durable
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model
from scmoe.training.assembly.trainer import build_callbacks, seed_everything
from scmoe.training.modules import LanguageModel
from scmoe.training.muon import adamw
from tests.support.faults import tiny_run
from tests.support.resuming import exit_code
from tests.support.trainer_of import trainer_of

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

STEPS, BATCHES, AT_BATCH = 3, 20, 3
CONFIG = (
    "trainer.accumulate=2",
    f"trainer.checkpoint_every={tiny_run.NEVER}",
    f"data.val_sequences={BATCHES * 8}",
)


class Stopped(LanguageModel):
    """Rank `victim` of this model receives SIGTERM at the place `when`."""

    when, victim = "", 1
    evaluated = 0  # batches of a validation, test or prediction
    handlers: tuple[
        tuple[str, Any], ...
    ] = ()  # of SIGTERM, in each batch of training and evaluation

    def reach(self, place: str) -> None:
        if place == self.when and self.wire.mesh.rank == self.victim:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_fit_start(self) -> None:
        self.reach("set up")

    def on_train_start(self) -> None:
        self.reach("before the first step")

    def on_train_end(self) -> None:
        self.reach("after the last step")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.handlers += (("train", signal.getsignal(signal.SIGTERM)),)
        if batch_idx == STEPS * 2 - 1:
            self.reach("in the last step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluated += 1
        if batch_idx == AT_BATCH:
            self.reach("evaluated")
        if self.trainer.sanity_checking:
            self.reach("sanity check")
        self.handlers += (("validate", signal.getsignal(signal.SIGTERM)),)
        super().validation_step(batch, batch_idx)

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        pass


def build(
    rank: int, world_size: int, folder: Path, when: str, *overrides: str
) -> tuple[Trainer, Stopped, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # without a ModelCheckpoint, checkpoints are saved in the working directory
    config = tiny_run.tiny(world_size, *CONFIG, *overrides)
    seed_everything(config.seed)
    module = Stopped(
        lambda wire: build_model(config, wire),
        max_steps=2 * STEPS,
        make_optimizer=partial(adamw, lr=0.01),
        warmup_steps=2,
    )
    module.when = when
    trainer = trainer_of(config, build_callbacks(config, folder)[:1], [])
    trainer.num_sanity_val_steps = AT_BATCH if when == "sanity check" else 0
    return trainer, module, build_datamodule(config)


def fit(
    rank: int, world_size: int, folder: Path, when: str, steps: int, resume_from: Path | None
) -> tuple[Any, int, dict[str, Tensor]]:
    """Return a run's exit code, its last step and its tensors."""
    trainer, module, data = build(rank, world_size, folder, when, f"trainer.max_steps={steps}")
    before = signal.getsignal(signal.SIGTERM)
    code = exit_code(lambda: trainer.fit(module, data, ckpt_path=resume_from, weights_only=True))
    assert signal.getsignal(signal.SIGTERM) == before, "the earlier handler is restored"
    return (
        code,
        trainer.global_step,
        {name: t.clone() for name, t in tiny_run.tensors(trainer).items()},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[Any]:
    return run_ranks(fit, 2, tmp_path_factory.mktemp("uninterrupted"), "", 2 * STEPS, None)


WHEN = {"set up": 0, "sanity check": 0, "before the first step": 0, "in the last step": STEPS}


@pytest.mark.parametrize(
    "when", [*WHEN, pytest.param("after the last step", marks=pytest.mark.representative)]
)
def test_sigterm_before_the_first_step_or_after_the_last_is_not_lost(when, uninterrupted, tmp_path):
    step = WHEN.get(when, STEPS)
    stopped = run_ranks(fit, 2, tmp_path, when, STEPS, None)
    assert [(code, at) for code, at, _ in stopped] == [(EXIT_CODE, step)] * 2
    (saved,) = tmp_path.rglob("*.ckpt")
    assert (saved.name, durable.verify(saved)) == (f"step={step}.ckpt", step)
    resumed = run_ranks(fit, 2, tmp_path / "resumed", "", 2 * STEPS, saved)
    for (code, at, tensors), (_, _, expected) in zip(resumed, uninterrupted, strict=True):
        assert (code, at) == (None, 2 * STEPS)
        # after a sanity check dropout differs
        assert when == "sanity check" or tiny_run.same(tensors, expected)


def evaluate(rank: int, world_size: int, folder: Path, verb: str) -> tuple[Any, int]:
    trainer, module, data = build(rank, world_size, folder, "evaluated")
    before = signal.getsignal(signal.SIGTERM)
    data.setup()
    code = exit_code(lambda: getattr(trainer, verb)(module, data.val_dataloader()))
    assert signal.getsignal(signal.SIGTERM) == before, "the earlier handler is restored"
    return code, module.evaluated


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_sigterm_in_an_evaluation_ends_it_and_saves_nothing(verb, tmp_path):
    (code, evaluated), other = run_ranks(evaluate, 2, tmp_path, verb)
    assert (code, evaluated) == other
    assert code == EXIT_CODE and AT_BATCH < evaluated < BATCHES
    assert not [*tmp_path.rglob("*.ckpt")], "nothing was trained"


def evaluate_what_was_trained(rank: int, world_size: int, folder: Path, load: Path | None) -> Any:
    """Train, and stop a validation that follows. load: a checkpoint to evaluate; its weights must
    not be saved as those of the last training step."""
    trainer, module, data = build(rank, world_size, folder, "", f"trainer.max_steps={STEPS}")
    trainer.fit(module, data)
    module.when = "evaluated"
    loader = data.val_dataloader()
    return exit_code(lambda: trainer.validate(module, loader, ckpt_path=load, weights_only=True))


def test_sigterm_in_a_validation_after_a_fit_saves_only_trained_weights(tmp_path):
    assert run_ranks(evaluate_what_was_trained, 2, tmp_path / "trained", None) == [EXIT_CODE] * 2
    (saved,) = (tmp_path / "trained").rglob("*.ckpt")
    assert (saved.name, durable.verify(saved)) == (f"step={STEPS}.ckpt", STEPS)
    assert run_ranks(evaluate_what_was_trained, 2, tmp_path / "loaded", saved) == [EXIT_CODE] * 2
    assert not [*(tmp_path / "loaded").rglob("*.ckpt")]


class WithoutLength(IterableDataset[dict[str, Tensor]]):
    """This dataset has no length."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def validate_without_length(rank: int, world_size: int, folder: Path, when: str) -> list[Any]:
    trainer, module, data = build(
        rank, world_size, folder, when, "trainer.max_steps=3", "trainer.val_every=2"
    )
    data.setup()
    loader = DataLoader(WithoutLength(list(data.val_dataloader())), batch_size=None)
    data.val_dataloader = lambda: loader
    trainer.fit(module, data)
    return [(stage, handler == signal.SIG_DFL) for stage, handler in module.handlers]


def test_where_ranks_cannot_ask_each_other_a_process_ends_at_once(tmp_path):
    for handlers in run_ranks(validate_without_length, 2, tmp_path, ""):
        assert set(handlers) == {("train", False), ("validate", True)}
        assert handlers[-1] == ("train", False), "after the validation SIGTERM sets a flag again"
    with pytest.raises(
        RankError, match="rank 1 of 2 failed first:\nthe process ended without a report"
    ):
        run_ranks(validate_without_length, 2, tmp_path, "evaluated")
