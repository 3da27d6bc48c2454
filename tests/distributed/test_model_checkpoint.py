"""Lightning's ModelCheckpoint over this library's directories: the best k, the last, in the foreground and beside
training; and a run that goes on from the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from scmoe.parallel import durable
from scmoe.testbed.ranks import run_ranks
from scmoe.training import build
from scmoe.training.callbacks import DataPosition
from tests.distributed.test_ep_equality import tiny

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("ranks")]

SCORES = [3.0, 1.0, 5.0, 0.0, 4.0, 2.0]  # of steps 1 to 6


class Score(DataPosition):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        trainer.lightning_module.log("score", SCORES[trainer.global_step - 1])


def fit(
    rank: int, world_size: int, folder: Path, background: bool, last: Any, resume_from: Path | None
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The best paths that the callback knows, best first, and the weights at the end."""
    config = tiny(f"position=pos2 model.dropout=0.1 strategy.ep_size=2 trainer.max_steps={len(SCORES)}", world_size)
    build.seed_everything(config)
    best = ModelCheckpoint(
        folder, "{step}", monitor="score", mode="min", save_top_k=2, save_last=last, every_n_train_steps=1
    )
    trainer = build.build_trainer(config, [Score(), best], [])
    trainer.strategy.async_checkpoint = background
    trainer.limit_val_batches = 0  # else Lightning leaves the last step to a validation, which there is none of
    module = build.build_module(config)
    trainer.fit(module, build.build_datamodule(config), ckpt_path=resume_from, weights_only=True)
    known = sorted(best.best_k_models, key=lambda path: best.best_k_models[path])
    assert best.best_model_path == known[0]
    return [Path(path).name for path in known], {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("last", [True, "link"])
@pytest.mark.parametrize("background", [False, True])
def test_the_best_two_and_the_last_are_there_and_whole(background, last, tmp_path):
    for known, _ in run_ranks(fit, 2, tmp_path, background, last, None):
        assert known == ["step=4.ckpt", "step=2.ckpt"]
    steps = {path.name: durable.verify(path) for path in tmp_path.iterdir()}
    assert steps == {"step=2.ckpt": 2, "step=4.ckpt": 4, "last.ckpt": 6 if last is True else 4}, (
        "a link: to the last saved"
    )


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_from_the_last_and_keeps_the_best(background, tmp_path):
    straight = run_ranks(fit, 2, tmp_path / "straight", background, True, None)
    saved = tmp_path / "straight" / "step=4.ckpt"
    for (known, weights), (_, expected) in zip(
        run_ranks(fit, 2, tmp_path / "straight", background, True, saved), straight, strict=True
    ):
        assert known == ["step=4.ckpt", "step=2.ckpt"], "told by the checkpoint"
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
