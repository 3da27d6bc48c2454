"""Faults 1 to 6 of docs/troubleshooting.md: real saves by two ranks are killed or damaged, or fail.

`python -m tests.support.faults` does the same at every point; these tests take fewer.
tests/parallel/checkpoint/test_durable.py tests the commit alone: it is killed at every call, and
every flipped bit is found.
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
from pathlib import Path

import pytest

from experiments.engine.ranks import RankError, run_ranks
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.training.assembly.model import build_model
from tests.support.faults import damaged, tiny_run
from tests.support.faults.tiny_run import LAST, NEW, OLD

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


def test_sigkill_during_a_save_loses_nothing_mixes_no_steps_and_leaves_nothing():
    """Ranks are killed in the foreground and in the background: rank 0, the last rank and all
    ranks."""
    found = damaged.kill(points=4, random=6)
    assert found["killed"] >= 24, "at some operations of both kinds of saves"
    assert (found["lost"], found["mixed"], found["leftovers"]) == (0, 0, 0)


def save_new(rank: int, world_size: int, folder: Path) -> None:
    tiny_run.save_marked(tiny_run.one_step(world_size, folder), folder / "checkpoints" / LAST, NEW)


KILLS = 20


def test_twenty_killed_saves_in_a_row_lose_nothing_and_do_not_fill_the_disk(tmp_path):
    """They use one folder, with no complete save between them: each sweeps the leftovers of those
    before it."""
    folder, draw = tmp_path / "run", random.Random(0)
    operations = len(run_ranks(damaged.save_over, 2, tmp_path, "first", False)[0]["operations"])
    run_ranks(damaged.write_old, 2, folder)
    model, newest, kills, step = build_model(tiny_run.tiny(1)), OLD, 0, NEW
    while kills < KILLS:
        step += 1
        victim, background = draw.choice(["first", "last", "all"]), draw.random() < 0.5
        kills += damaged.killed(
            folder, victim, background, operation=draw.randrange(operations), steps=[step]
        )
        path = durable.newest_good(folder / "checkpoints")
        assert durable.verify(path) in (newest, step)
        newest = durable.verify(path)
        load_model(path, model)
        assert {float(value) for p in model.parameters() for value in p.detach().unique()} == {
            newest
        }
    assert newest > NEW, "some were killed after the new checkpoint was whole"
    run_ranks(save_new, 2, folder)
    assert os.listdir(folder / "checkpoints") == [LAST]
    assert durable.verify(folder / "checkpoints" / LAST) == NEW


# -------------------------------------------------- a disk that refuses to write


def save_with_trouble(
    rank: int, world_size: int, folder: Path, trouble: str, bad_rank: int, background: bool
) -> str:
    """Return this rank's error of a save in which one rank's disk refuses to write. A healthy save
    follows."""
    trainer, path = tiny_run.one_step(world_size, folder), folder / "checkpoints" / LAST
    tiny_run.save_marked(trainer, path, OLD)
    target, fsync, limit = path, os.fsync, resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "not a directory":
        (folder / "file").touch()
        target = folder / "file" / LAST
    if rank == bad_rank and trouble == "file too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    if rank == bad_rank and trouble == "no space at fsync":

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    said = "nothing"
    try:
        tiny_run.save_marked(trainer, target, NEW, background)
    except OSError as error:
        said = str(error)
    finally:
        os.fsync = fsync
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    trainer.strategy.barrier()
    if rank == 0:
        assert durable.verify(durable.newest_good(folder / "checkpoints")) == OLD
        assert os.listdir(folder / "checkpoints") == [LAST], (
            "a partial checkpoint would keep the disk full"
        )
        assert said.count("\n") == 0, "one line"
    trainer.strategy.barrier()
    tiny_run.save_marked(trainer, path, NEW)
    return said


TROUBLES = [
    ("file too large", 0, "File too large"),
    ("file too large", 1, "File too large"),
    ("no space at fsync", 0, "No space left on device"),
    ("no space at fsync", 1, "No space left on device"),
    ("not a directory", 0, "(Not a directory|File exists)"),
]


@pytest.mark.parametrize(
    "background, trouble, bad_rank, says",
    [
        pytest.param(False, *TROUBLES[0], marks=pytest.mark.representative),
        *((False, *trouble) for trouble in TROUBLES[1:]),
        *((True, *trouble) for trouble in TROUBLES),
    ],
)
def test_a_disk_that_refuses_to_write_is_an_error_on_every_rank(
    background, trouble, bad_rank, says, tmp_path
):
    """No rank hangs, the old checkpoint stays whole, and the next save leaves nothing behind."""
    for said in run_ranks(
        save_with_trouble, 2, tmp_path, trouble, bad_rank, background, timeout_s=60
    ):
        assert re.search(says, said), said
    assert os.listdir(tmp_path / "checkpoints") == [LAST]
    assert durable.verify(tmp_path / "checkpoints" / LAST) == NEW


# ---------------------------------------------------------------------- damage


def test_every_flipped_bit_is_refused():
    assert damaged.flip(100) == {"flips": 100, "refused": 100}


def read(rank: int, world_size: int, folder: Path, path: Path) -> None:
    tiny_run.load_into(tiny_run.one_step(world_size, folder), path)


def test_all_ranks_refuse_a_damaged_shard(tmp_path):
    run_ranks(damaged.write_old, 2, tmp_path)
    path = tmp_path / "checkpoints" / LAST
    names = sorted(file.name for file in path.iterdir())
    assert [name.split("-")[0] for name in names] == [
        "manifest.json",
        "meta.json",
        "shard",
        "shard",
    ]
    os.truncate(path / names[-1], (path / names[-1]).stat().st_size - 1)
    with pytest.raises(RankError, match=f"BrokenCheckpoint: .*{names[-1]} is damaged") as error:
        run_ranks(read, 2, tmp_path / "read", path, timeout_s=30, grace_s=30)
    assert "later: " in str(error.value)
    with pytest.raises(durable.BrokenCheckpoint, match=names[-1]):
        load_model(path, build_model(tiny_run.tiny(1)))
