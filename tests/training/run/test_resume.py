"""Faults 8, 9 and 11: a run resumes at any step, at any EP degree and on any number of ranks.

`python -m tests.support.faults resume` and `reshard` test every step and every pair of EP degrees.
Fault 12, SIGTERM, is in tests/training/run/test_stop_smoke.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint import durable, saving
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import seed_everything
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.modules import LanguageModel
from tests.support.faults import restored, tiny_run
from tests.support.trainer_of import trainer_of

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


@pytest.mark.parametrize(
    "world_size, workers",
    [(1, 0), (1, 2), (2, 0), pytest.param(2, 2, marks=pytest.mark.representative)],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(world_size, workers):
    """The run has dropout, gate noise, shuffled samples, gradients accumulated over two batches,
    and a validation after every step. It resumes at the first step and the last but one."""
    assert restored.resume(2, [world_size], [workers]) == {"compared": 2, "bit_equal": 2}


def weights_after(rank: int, world_size: int, folder: Path, val_every: int) -> dict[str, Tensor]:
    words = (
        "trainer.max_steps=3",
        f"trainer.checkpoint_every={tiny_run.NEVER}",
        f"trainer.val_every={val_every}",
    )
    config = tiny_run.tiny(world_size, *words, "data.val_sequences=16")
    return dict(tiny_run.tensors(tiny_run.fit(config, folder)))


@pytest.mark.representative
def test_validating_changes_no_dropout(tmp_path):
    """Each validation starts a loader, which must not draw from the generator that dropout draws
    from."""
    seldom, often = (run_ranks(weights_after, 1, tmp_path / str(n), n)[0] for n in (1000, 1))
    assert tiny_run.same(seldom, often)


def run_without_random_state(
    rank: int, world_size: int, dense: str, folder: Path, resume_from: list[Path]
) -> list[dict[str, Any]]:
    with patch.object(saving, "set_rng_states"):
        return restored.run(rank, world_size, 0, dense, folder, resume_from)


def test_the_comparison_finds_a_random_state_that_is_not_restored(tmp_path):
    """Otherwise the comparison above would show nothing."""
    ((uninterrupted,),) = run_ranks(
        restored.run, 1, 0, "replicated", tmp_path / "uninterrupted", []
    )
    saved = [tmp_path / "uninterrupted" / "0" / "checkpoints" / "step=3.ckpt"]
    ((resumed,),) = run_ranks(
        run_without_random_state, 1, "replicated", tmp_path / "resumed", saved
    )
    assert not tiny_run.same(resumed, uninterrupted)


def run_that_draws(
    rank: int, world_size: int, dense: str, folder: Path, resume_from: list[Path]
) -> list[dict[str, Any]]:
    """Draw from Python and NumPy in each step, as a user's own transforms may."""
    training_step = LanguageModel.training_step

    def drawing(module: LanguageModel, batch: dict[str, Tensor], batch_idx: int) -> Any:
        result = training_step(module, batch, batch_idx)
        result["loss"] = result["loss"] * (1 + 0.1 * random.gauss(0, 1) + 0.1 * np.random.randn())
        return result

    with patch.object(LanguageModel, "training_step", drawing):
        return restored.run(rank, world_size, 0, dense, folder, resume_from)


def test_the_random_states_of_python_and_numpy_are_restored_too(tmp_path):
    uninterrupted = run_ranks(run_that_draws, 2, "replicated", tmp_path / "uninterrupted", [])
    saved = [tmp_path / "uninterrupted" / "0" / "checkpoints" / "step=3.ckpt"]
    resumed = run_ranks(run_that_draws, 2, "replicated", tmp_path / "resumed", saved)
    assert all(tiny_run.same(a, b) for (a,), (b,) in zip(resumed, uninterrupted, strict=True))


STOPPED = 5  # batches after which the second training ends, inside its third step


class Watch(Callback):
    """Notes what is in a folder before each batch. stop_after: training stops after so many
    batches."""

    def __init__(self, folder: Path, stop_after: int | None) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.seen: list[list[str]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append([path.name for path in self.folder.glob("*.ckpt")])

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = self.stop_after == batch_idx + 1


def saved_inside_steps(
    rank: int, world_size: int, folder: Path
) -> tuple[list[list[str]], list[dict[str, Tensor]]]:
    """Train steps of two batches with a default ModelCheckpoint and a validation after the third
    batch. Return what is in its folder before each batch, and how three runs end: this one, one
    that resumes from its first checkpoint, and one that stops inside a step."""
    ends, watched = [], []
    first = folder / "0" / "epoch=0-step=1.ckpt"
    for i, resume_from, stop_after in ((0, None, None), (1, first, None), (2, None, STOPPED)):
        config = tiny_run.tiny(
            world_size, "trainer.accumulate=2", "trainer.max_steps=4", "data.val_sequences=16"
        )
        seed_everything(config.seed)
        watched.append(Watch(folder / str(i), stop_after))
        best = ModelCheckpoint(folder / str(i), save_top_k=-1)
        trainer: Any = trainer_of(config, [DataPosition(), watched[-1], best], [])
        trainer.val_check_interval, trainer.limit_val_batches = stop_after or 3, 1
        trainer.fit(
            build_module(config), build_datamodule(config), ckpt_path=resume_from, weights_only=True
        )
        ends.append(dict(tiny_run.tensors(trainer)))
        ends[-1]["consumed"] = torch.tensor(trainer.datamodule.consumed_samples)
        assert not trainer.strategy.checkpoints.postponed
    return watched[0].seen, ends


@pytest.mark.representative
def test_a_checkpoint_that_is_requested_inside_a_step_is_saved_at_its_end(tmp_path):
    """Gradients are in no checkpoint. It has the name that the callback expects, and a run that
    resumes from it ends as the uninterrupted one. A training that ends inside a step saves at its
    end."""
    name = "epoch=0-step=1.ckpt"
    for seen, (whole, resumed, _) in run_ranks(saved_inside_steps, 2, tmp_path):
        assert [name in there for there in seen] == [False] * 4 + [True] * 4
        assert tiny_run.same(whole, resumed)
    assert durable.verify(tmp_path / "0" / name) == 2, "the step that was taken"
    (last,) = (tmp_path / "2").iterdir()
    assert (last.name, durable.verify(last)) == ("epoch=0-step=2.ckpt", 2)


def fit_steps(
    rank: int, world_size: int, folder: Path, steps: int, resume_from: Path | None
) -> None:
    words = ("trainer.accumulate=2", f"trainer.max_steps={steps}", "trainer.checkpoint_every=1")
    tiny_run.fit(tiny_run.tiny(world_size, *words), folder, resume_from)


def test_a_run_does_not_change_the_checkpoint_that_it_resumes_from(tmp_path):
    """Lightning's callback would save it again after the first batch, which is in the middle of the
    next step."""
    run_ranks(fit_steps, 2, tmp_path, 2, None)
    saved = tmp_path / "checkpoints" / "step=2.ckpt"
    before = saved.stat().st_ino, (saved / durable.MANIFEST).read_bytes()
    run_ranks(fit_steps, 2, tmp_path, 3, saved)
    assert (saved.stat().st_ino, (saved / durable.MANIFEST).read_bytes()) == before
    assert durable.verify(tmp_path / "checkpoints" / "step=3.ckpt") == 3


@pytest.mark.parametrize(
    "degrees", [pytest.param((1, 2), marks=pytest.mark.representative), (1, 2, 4, 8)]
)
def test_another_ep_degree_reads_the_same_weights_and_moments(degrees):
    layouts = [restored.Layout(degree, degree) for degree in degrees]
    assert restored.reshard(layouts) == {"pairs": len(degrees) ** 2, "equal": len(degrees) ** 2}
