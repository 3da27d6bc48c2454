"""Faults 4 and 7 to 10: what a checkpoint holds, and which rank hashes it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.saving import Saving
from tests.support.faults import tiny_run
from tests.support.faults.tiny_run import LAST, NEW, OLD

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


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
