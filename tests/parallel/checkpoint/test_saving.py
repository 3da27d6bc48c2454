"""A checkpoint that is written in parallel with training has the weights of its step, and none is
removed before its successor is complete (fault 7). tests/parallel/checkpoint/test_saving_faults.py
overwrites every tensor meanwhile.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model, build_module
from scmoe.training.callbacks.data_position import DataPosition
from tests.support.trainer_of import trainer_of
from tests.support.trainings import tiny

pytestmark = pytest.mark.ranks

STEPS, SLOW_S = 3, 0.3
write_data = HuggingFaceStorageWriter.write_data


def slowly(*args: Any) -> Any:
    """Steps pass while it writes."""
    time.sleep(SLOW_S)
    return write_data(*args)


def train(world_size: int, folder: Path, background: bool) -> tuple[int, list[int]]:
    """Train with a checkpoint at every step. Return how many steps passed while one was being
    written, and how many complete checkpoints there were at each step after the first checkpoint.
    """
    overlapped, whole = 0, []

    class Watch(DataPosition):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            nonlocal overlapped
            saving = trainer.strategy.checkpoints.saving
            overlapped += saving is not None and not saving.is_written()
            if trainer.is_global_zero and (whole or list(folder.glob("*.ckpt"))):
                whole.append(len([path for path in folder.glob("*.ckpt") if durable.verify(path)]))

    words = f"trainer.max_steps={STEPS} strategy.ep_size=2 strategy.async_checkpoint={background}"
    config = tiny(f"position=pos2 top_k=2 {words}", world_size)
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1)
    trainer_of(config, [Watch(), checkpoints], []).fit(
        build_module(config), build_datamodule(config)
    )
    return overlapped, whole


def train_both(rank: int, world_size: int, folder: Path) -> tuple[int, list[int]]:
    train(world_size, folder / "blocking", False)
    with patch.object(HuggingFaceStorageWriter, "write_data", slowly):
        return train(world_size, folder / "background", True)


def test_a_checkpoint_written_in_parallel_with_training_has_the_weights_of_its_step(tmp_path):
    (overlapped, whole), _ = run_ranks(train_both, 2, tmp_path)
    assert overlapped > 0, (
        "no step passed while a checkpoint was being written, so this test shows nothing"
    )
    assert whole and min(whole) >= 1, "there was a moment without a complete checkpoint"
    stored = []
    for folder in (tmp_path / "blocking", tmp_path / "background"):
        assert [path.name for path in folder.iterdir()] == [f"step={STEPS}.ckpt"]
        model = build_model(tiny("position=pos2 top_k=2")).double()
        load_model(folder / f"step={STEPS}.ckpt", model)
        stored.append(model.state_dict())
    expected, got = stored
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
