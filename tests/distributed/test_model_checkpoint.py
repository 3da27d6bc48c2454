"""Lightning's ModelCheckpoint keeps the best k and the last of this library's checkpoints, in the foreground and in
parallel with training, and a run resumes from the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint import durable
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_trainer, seed_everything
from scmoe.training.callbacks.bookkeeping import DataPosition
from tests.support.trainings import tiny

pytestmark = pytest.mark.dist

SCORES = [3.0, 1.0, 5.0, 0.0, 4.0, 2.0]  # of steps 1 to 6


class Score(DataPosition):
    """Logs a score after each step and keeps the step's weights. stop_after: training stops after this step."""

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after
        self.weights_after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        step, module = trainer.global_step, trainer.lightning_module
        module.log("score", SCORES[step - 1])
        self.weights_after[step] = weights(module)
        trainer.should_stop = step == self.stop_after


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(weight, b[name]) for name, weight in a.items())


def prepared(
    world_size: int, folder: Path, background: bool, last: Any, stop_after: int | None = None
) -> tuple[Trainer, Any, Any]:
    config = tiny(f"position=pos2 model.dropout=0.1 strategy.ep_size=2 trainer.max_steps={len(SCORES)}", world_size)
    seed_everything(config)
    best = ModelCheckpoint(
        folder, "{step}", monitor="score", mode="min", save_top_k=2, save_last=last, every_n_train_steps=1
    )
    trainer = build_trainer(config, [Score(stop_after), best], [])
    trainer.strategy.async_checkpoint = background
    trainer.limit_val_batches = 0  # otherwise Lightning saves the last step in a validation, and there is none
    return trainer, build_module(config), build_datamodule(config)


def fit(
    rank: int,
    world_size: int,
    folder: Path,
    background: bool,
    last: Any,
    resume_from: Any,
    stop_after: int | None = None,
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Returns the best paths that the callback knows, the best first, and the weights at the end."""
    trainer, module, data = prepared(world_size, folder, background, last, stop_after)
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    best: Any = trainer.checkpoint_callback
    known = sorted(best.best_k_models, key=lambda path: best.best_k_models[path])
    assert best.best_model_path == known[0]
    return [Path(path).name for path in known], weights(module)


class Whole(NamedTuple):
    """A run that was not interrupted. ranks: what `fit` returned. steps: of each checkpoint that it left."""

    background: bool
    folder: Path
    ranks: list[tuple[list[str], dict[str, torch.Tensor]]]
    steps: dict[str, int]


@pytest.fixture(scope="module", params=[False, True], ids=["foreground", "background"])
def whole(request, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    ranks = run_ranks(fit, 2, folder, request.param, True, None)
    return Whole(request.param, folder, ranks, {path.name: durable.verify(path) for path in folder.iterdir()})


def test_the_best_two_and_the_last_exist_and_are_complete(whole, tmp_path):
    linked = run_ranks(fit, 2, tmp_path, whole.background, "link", None)
    assert [known for known, _ in whole.ranks + linked] == [["step=4.ckpt", "step=2.ckpt"]] * 4
    assert whole.steps == {"step=2.ckpt": 2, "step=4.ckpt": 4, "last.ckpt": 6}
    steps = {path.name: durable.verify(path) for path in tmp_path.iterdir()}
    assert steps == whole.steps | {"last.ckpt": 4}, "a link points to the last that was saved"


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one_and_keeps_the_best(whole):
    resumed = run_ranks(fit, 2, whole.folder, whole.background, True, whole.folder / "step=4.ckpt")
    for (known, got), (_, expected) in zip(resumed, whole.ranks, strict=True):
        assert known == ["step=4.ckpt", "step=2.ckpt"], "the checkpoint holds the best of the first run"
        assert same(got, expected)


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_stopped_run_resumes_from_lightning_s_own_last(whole, tmp_path):
    """The first run finds no last checkpoint and starts from the beginning."""
    run_ranks(fit, 2, tmp_path, whole.background, True, "last", 3)
    assert durable.verify(tmp_path / "last.ckpt") == 3
    resumed = run_ranks(fit, 2, tmp_path, whole.background, True, "last")
    assert all(same(got, expected) for (_, got), (_, expected) in zip(resumed, whole.ranks, strict=True))
    assert durable.verify(tmp_path / "last.ckpt") == len(SCORES)


def fit_and_test_the_best(rank: int, world_size: int, folder: Path, background: bool) -> list[bool]:
    """Returns, for each batch of the test, whether the weights were those of the best step."""
    trainer, module, data = prepared(world_size, folder, background, True)
    trainer.fit(module, data)
    score, seen = trainer.callbacks[0], []
    assert isinstance(score, Score) and same(weights(module), score.weights_after[6])
    module.test_step = lambda batch, batch_idx: seen.append(same(weights(module), score.weights_after[4]))
    trainer.test(module, data, ckpt_path="best", weights_only=True, verbose=False)
    return seen


@pytest.mark.parametrize("background", [False, True])
def test_lightning_tests_its_own_best(background, tmp_path):
    for seen in run_ranks(fit_and_test_the_best, 2, tmp_path, background):
        assert seen and all(seen)
