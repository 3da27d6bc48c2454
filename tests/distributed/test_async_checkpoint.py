"""A checkpoint that is written in parallel with training is a snapshot (fault 7).

No checkpoint is removed before its successor is complete.
"""

import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model, build_module
from scmoe.training.assembly.trainer import build_trainer
from scmoe.training.callbacks.bookkeeping import DataPosition
from tests.support.trainings import tiny

pytestmark = pytest.mark.dist

STEPS, SLOW_S = 6, 0.3


def slow_writer(seconds):
    """Makes every write longer by this time, so that steps pass while it runs."""
    write_data = HuggingFaceStorageWriter.write_data

    def slowly(self, plan, planner):
        time.sleep(seconds)
        return write_data(self, plan, planner)

    HuggingFaceStorageWriter.write_data = slowly


def train(rank, world_size, folder, background):
    """Trains with a checkpoint at every step. Returns how many steps passed while one was being written, and how many
    complete checkpoints there were at each step after the first checkpoint."""
    overlapped, whole = 0, []

    class Watch(DataPosition):
        def on_train_batch_start(self, trainer, *_):
            nonlocal overlapped
            saving = trainer.strategy.checkpoints.saving
            overlapped += saving is not None and not saving.is_written()
            if rank == 0 and (whole or list(folder.glob("*.ckpt"))):
                whole.append(len([path for path in folder.glob("*.ckpt") if durable.verify(path)]))

    slow_writer(SLOW_S if background else 0)
    config = tiny(f"position=pos2 top_k=2 trainer.max_steps={STEPS} strategy.ep_size=2", world_size)
    module = build_module(config)
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1)
    trainer = build_trainer(config, [Watch(), checkpoints], [])
    assert isinstance(trainer.strategy, ExpertParallelStrategy)
    trainer.strategy.async_checkpoint = background
    trainer.fit(module, build_datamodule(config))
    return overlapped, whole


def weights(path):
    config = tiny("position=pos2 top_k=2 trainer.max_steps=1", 1)
    model = build_model(config, ParallelContext()).double()
    load_model(path, model, prefix="model.")
    return model.state_dict()


def test_a_checkpoint_written_in_parallel_with_training_has_the_weights_of_its_step(tmp_path: Path):
    blocking, background = tmp_path / "blocking", tmp_path / "background"
    run_ranks(train, 2, blocking, False)
    (overlapped, whole), _ = run_ranks(train, 2, background, True)
    assert overlapped > 0, "no step passed while a checkpoint was being written, so this test shows nothing"
    assert whole and min(whole) >= 1, "there was a moment without a complete checkpoint"
    assert [p.name for p in background.iterdir()] == [p.name for p in blocking.iterdir()] == [f"step={STEPS}.ckpt"]
    expected, got = (weights(folder / f"step={STEPS}.ckpt") for folder in (blocking, background))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def snapshot(rank, world_size, folder):
    """Overwrites the weights right after the checkpoint was started. Returns the dense weights before that."""
    slow_writer(SLOW_S)
    config = tiny("position=pos2 top_k=2 trainer.max_steps=1 strategy.ep_size=2", world_size)
    module = build_module(config)

    class Overwrite(DataPosition):
        def on_train_start(self, trainer, pl_module):
            dense = {name: p for name, p in pl_module.model.named_parameters() if "experts" not in name}
            self.before = {name: p.detach().clone() for name, p in dense.items()}
            trainer.save_checkpoint(folder / "step=0.ckpt")
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.fill_(7.0)
            trainer.strategy.checkpoints.finish()

    overwrite = Overwrite()
    trainer = build_trainer(config, [overwrite], [])
    trainer.strategy.async_checkpoint = True
    trainer.fit(module, build_datamodule(config))
    return overwrite.before


def test_later_training_does_not_change_a_snapshot(tmp_path: Path):
    before, _ = run_ranks(snapshot, 2, tmp_path)
    stored = weights(tmp_path / "step=0.ckpt")
    assert before and all(torch.equal(stored[name], before[name]) for name in before)
    assert not any((t == 7.0).all() for t in stored.values())
