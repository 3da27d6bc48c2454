"""Saving beside training: a checkpoint has the weights of its step, each rank hashes its own shard,
and none is removed before its successor is complete (faults 4 and 7 to 10)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint import durable, saving
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model, build_module
from scmoe.training.callbacks.data_position import DataPosition
from tests.support.faults import tiny_run
from tests.support.faults.tiny_run import LAST, NEW, OLD
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


def files_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def save_slowly_then_train_on(rank: int, world_size: int, folder: Path) -> set[float]:
    """Overwrite every tensor while or after a checkpoint of OLD is written. Return what is read
    back."""
    trainer, path, fsync = (
        tiny_run.one_step(world_size, folder),
        folder / "checkpoints" / LAST,
        os.fsync,
    )

    def slow(handle: int) -> None:
        time.sleep(0.1)
        fsync(handle)

    found = set()
    with patch.object(os, "fsync", slow):
        for background in (False, True):
            tiny_run.save_marked(trainer, path, OLD, background)
            tiny_run.mark(trainer, NEW)
            tiny_run.load_into(trainer, path)
            found |= {
                float(value) for t in tiny_run.tensors(trainer).values() for value in t.unique()
            }
    return found


@pytest.mark.faults
@pytest.mark.representative
def test_a_slow_save_holds_the_step_at_which_it_started(tmp_path):
    assert run_ranks(save_slowly_then_train_on, 2, tmp_path) == [{OLD}, {OLD}]


def note_what_is_hashed(rank: int, world_size: int, folder: Path) -> list[dict[str, list[str]]]:
    """Save in the foreground, then in the background. Return of each what `noted_in` does."""
    trainer = tiny_run.one_step(world_size, folder)
    return [
        noted_in(trainer, folder / f"{background}.ckpt", background) for background in (False, True)
    ]


def noted_in(trainer: Any, path: Path, background: bool) -> dict[str, list[str]]:
    """Return the hashed files by their reader: a background thread, or the rank while it saves,
    finishes or loads."""
    fingerprint, read = durable.fingerprint, {}
    moment = "saving"

    def noted(path: Path) -> dict[str, Any]:
        who = (
            moment if threading.current_thread().name in ("MainThread", "together") else "a thread"
        )
        read.setdefault(who, []).append(path.name)
        return fingerprint(path)

    with patch.object(durable, "fingerprint", noted):
        saving = Saving(
            path,
            tiny_run.state(trainer, OLD),
            trainer.lightning_module,
            trainer.strategy.mesh,
            background,
        )
        moment = "finishing"
        saving.finish()
        moment = "loading"
        tiny_run.load_into(trainer, path)
    return read


@pytest.mark.faults
@pytest.mark.representative
def test_each_rank_hashes_its_own_shard_where_it_writes_it(tmp_path):
    """Otherwise rank 0 would read all shards at the end, while training waits."""
    ways = zip(*run_ranks(note_what_is_hashed, 2, tmp_path), strict=True)
    for ranks, writer, name in zip(
        ways, ("saving", "a thread"), ("False.ckpt", "True.ckpt"), strict=True
    ):
        shards = [file for file in files_of(tmp_path / name) if file.startswith("shard")]
        assert [file for read in ranks for file in read[writer]] == shards
        assert [read.get("finishing") for read in ranks] == [["meta.json"], None]
        loaded = [file for read in ranks for file in read["loading"]]
        assert sorted(loaded) == ["meta.json", *shards] and all(
            read["loading"] for read in ranks
        ), "each file once"
        assert durable.verify(tmp_path / name) == OLD


def test_a_writer_does_not_wait_for_the_stream_of_training(tmp_path, monkeypatch):
    """Where there is a GPU, torch would copy from it through a loader that waits for its stream."""

    def overlapping(*_, **__):
        raise AssertionError("torch reads tensors as if they were on the GPU")

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", overlapping)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    writer = saving._ShardWriter(tmp_path)
    dcp.save({"weight": torch.ones(4)}, storage_writer=writer, no_dist=True)
    assert [*tmp_path.glob("*.safetensors")]


def names_to_copy(rank: int, world_size: int, folder: Path) -> dict[str, set[str]]:
    """Return the names of what `async_save` gets on this rank: whole tensors, and slices."""
    trainer = tiny_run.one_step(world_size, folder)
    names: dict[str, set[str]] = {"whole": set(), "slices": set()}
    async_save = dcp.async_save

    def noted(tensors: dict[str, torch.Tensor], **options: Any) -> Any:
        for name, tensor in tensors.items():
            names["slices" if isinstance(tensor, DTensor) else "whole"].add(name)
        return async_save(tensors, **options)

    with patch.object(dcp, "async_save", noted):
        tiny_run.save_marked(trainer, folder / "checkpoints" / LAST, OLD, background=True)
    return names


def test_a_rank_copies_no_whole_tensor_that_a_lower_rank_writes(tmp_path):
    first, second = run_ranks(names_to_copy, 2, tmp_path)
    assert not first["whole"] & second["whole"] and len(first["whole"]) > len(second["whole"])
    assert first["slices"] and first["slices"] == second["slices"]
