"""Faults 13 and 14 of docs/troubleshooting.md stop a run: every rank ends soon and says why.

Some tests run their ranks with run_ranks, others run the train command: if a rank is killed or
stopped, run_ranks would end the others itself.
"""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.lightning.hung_ranks import LEFT_ALONE, roll_call
from scmoe.lightning.job import START_TIMEOUT_S
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.durable import process_start
from scmoe.parallel.mesh import Mesh
from scmoe.training.assembly.model import build_module
from tests.support.commands import TRAIN, children, running
from tests.support.failing import MODEL, failure
from tests.support.trainings import fit, tiny

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

# ---------------------------------------------------------------------- how long a rank waits


def timeouts(rank: int, world_size: int, seconds: float) -> tuple[list[float], set[float]]:
    """Return the timeout of the default group while modules are built, then those of all process
    groups, in s."""

    def of(group: Any) -> float:
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    config = tiny(f"{MODEL} strategy.timeout_s={seconds}", world_size)
    module, starting = build_module(config), []
    module.setup = lambda stage: starting.append(of(dist.group.WORLD))  # type: ignore[method-assign]
    fit(config, module=module)
    groups = dist.distributed_c10d._world.pg_map
    assert {group.group_desc for group in groups} >= {"ep", "edp", "checkpoint", "control"}
    return starting, {of(group) for group in groups}


@pytest.mark.representative
def test_no_group_waits_longer_than_the_timeout():
    """gloo waits half an hour by default, and new groups do not inherit the timeout of the first
    one. Ranks have longer to start."""
    assert run_ranks(timeouts, 2, 37.0) == [([START_TIMEOUT_S], {37.0})] * 2
    assert ExpertParallelStrategy(timeout_s=1000.0).start_timeout == timedelta(seconds=1000)
    assert ExpertParallelStrategy().timeout == timedelta(minutes=5)


# -------------------------------------------------- callbacks that save after an exception


class Broken(RuntimeError):
    pass


def savers(how: str, folder: Path) -> list[Callback]:
    """Return callbacks that save every second step, and once more after an exception."""
    if how == "save_on_exception":
        return [
            ModelCheckpoint(
                folder, "{step}", every_n_train_steps=2, save_last="link", save_on_exception=True
            )
        ]
    return [ModelCheckpoint(folder, "{step}", every_n_train_steps=2), OnExceptionCheckpoint(folder)]


def raise_and_save(rank: int, world_size: int, bad: int, how: str, folder: Path) -> None:
    config = tiny(f"{MODEL} trainer.accumulate=1 trainer.max_steps=6", world_size)
    module = build_module(config)
    train = module.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Any:
        if rank == bad and batch_idx == 3:
            raise Broken("in step 3")
        return train(batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        try:
            fit(config, *savers(how, folder), module=module)
        except Broken as error:
            lines = [
                str(line.message) for line in said if "no checkpoint is saved" in str(line.message)
            ]
            error.add_note(f"said {len(lines)} time(s): {lines[0]}")
            raise


@pytest.mark.parametrize("how", ["OnExceptionCheckpoint", "save_on_exception"])
@pytest.mark.parametrize("bad", [pytest.param(0, marks=pytest.mark.representative), 1])
def test_callbacks_that_save_after_an_exception_wait_for_no_rank(bad, how, tmp_path):
    """The other rank is in a collective of training, so saving would hang and hide the error."""
    message = failure(raise_and_save, 2, bad, how, tmp_path)
    assert message.startswith(f"rank {bad} of 2 failed first:\nTraceback")
    assert "Broken: in step 3" in message and "another exception occurred" not in message
    assert "said 1 time(s): no checkpoint is saved after an exception: " in message
    left = {path.name: durable.verify(path) for path in tmp_path.iterdir()}
    last = {"last.ckpt": 2} if how == "save_on_exception" else {}
    assert left == {"step=2.ckpt": 2, **last}, "the checkpoint is whole, and the link to it is kept"


# -------------------------------------------------- a real run, whose ranks are processes

# The train command with a rank that fails. argv: how, that rank, where, in which call, then the
# command's arguments.
FAILING = """
import gc
gc.disable()  # imports would make it look for garbage
import importlib, inspect, os, sys
how, rank, place, turn = sys.argv[1:5]
module, _, path = place.partition(":")
owner, calls = importlib.import_module(module), 0
*outer, name = path.split(".")
for part in outer:
    owner = getattr(owner, part)
healthy = getattr(owner, name)
static = isinstance(inspect.getattr_static(owner, name), staticmethod)
def broken(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(turn) and os.environ.get("LOCAL_RANK", "0") == rank:
        while how == "stuck":
            pass
        raise RuntimeError(f"rank {rank} is broken")
    return healthy(*args, **kwargs)
setattr(owner, name, staticmethod(broken) if static else broken)
from scmoe.command_line import call
sys.exit(call("train", *sys.argv[5:]))
"""
PHASES = {  # where a rank fails, and in which call of it
    "setup": ("scmoe.training.modules:LanguageModel.configure_model", 1),
    "step": ("scmoe.training.modules:LanguageModel.training_step", 4),
    "forward": ("scmoe.moe.experts:Experts.forward", 4),  # between dispatch and combine
    "backward": ("scmoe.moe.experts:_MLPsInTurn.backward", 3),
    "update": ("torch.optim:AdamW.step", 3),
    "validation": ("scmoe.training.modules:LanguageModel.validation_step", 1),
    "save": ("scmoe.parallel.checkpoint.saving:dcp.save", 1),
}
TIMEOUT_S, LONG_S = 30.0, 100.0  # where connections close, no rank waits that long
ENDLESS = (
    *("trainer.max_steps=1000000", "trainer.val_every=1000000", "trainer.checkpoint_every=1000000"),
    f"strategy.timeout_s={TIMEOUT_S}",
)
PATIENT = ("trainer.val_every=2", "trainer.checkpoint_every=3", f"strategy.timeout_s={LONG_S}")
SLACK_S = 30.0  # for the interpreter's end and Lightning's observer, which looks every 5 s


def training(
    tmp_path: Path, command: tuple[str, ...], *overrides: str
) -> AbstractContextManager[Popen[str]]:
    return running(
        *command, "configs/debug.yaml", "trainer.devices=2", f"runs_dir={tmp_path}", *overrides
    )


def failing(tmp_path: Path, how: str, rank: int, phase: str) -> tuple[str, ...]:
    """Return the words of a train command with a rank that fails."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    place, call = PHASES[phase]
    return str(script), how, str(rank), place, str(call)


@pytest.mark.parametrize("rank, phase", [*((1, phase) for phase in PHASES), (0, "forward")])
def test_a_rank_that_raises_ends_all_ranks_and_its_error_comes_first(tmp_path, rank, phase):
    with training(tmp_path, failing(tmp_path, "raises", rank, phase), *PATIENT) as run:
        _, said = run.communicate(timeout=2 * LONG_S)  # until every rank has closed its stderr
    assert run.returncode != 0
    before, _, after = said.partition(f"RuntimeError: rank {rank} is broken")
    assert after, said
    assert before.count("Traceback") == 1 and not LEFT_ALONE.search(before), said


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGSTOP))
@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_killed_or_stopped_ends_the_run(tmp_path, rank, how):
    with training(tmp_path, TRAIN, *ENDLESS) as run:
        assert any(line.startswith("step 3/") for line in run.stderr), "the run does not train"
        (other,) = children(run.pid)
        os.kill(other if rank == 1 else run.pid, how)
        assert not left_of([run.pid, other]), "a rank is still there"
    said = run.stderr.read()
    if how == signal.SIGSTOP:
        assert re.search(r"[Tt]imed out", said), said
    assert re.search(
        rf"rank {1 - rank} waited at .*; roll call: no answer from rank {rank}", said
    ), said


def call(rank: int, world_size: int, silent: list[int]) -> list[int] | None:
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    return None if rank in silent else roll_call(Mesh(rank, world_size, checkpoint_group=group))


@pytest.mark.representative
def test_a_roll_call_names_the_missing_ranks():
    """The roll call has its own timeout; run_ranks would end the ranks before the groups' timeout
    of half an hour."""
    assert run_ranks(call, 4, [2, 3]) == [[2, 3], [], None, None]
    assert run_ranks(call, 2, [0]) == [None, [0]]


@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_that_is_stuck_is_ended(tmp_path, rank):
    """The rank is in an endless loop, so only SIGKILL can end it."""
    with training(tmp_path, failing(tmp_path, "stuck", rank, "step"), *ENDLESS) as run:
        assert any(line.startswith("step 3/") for line in run.stderr), "the run does not train"
        assert not left_of([run.pid, *children(run.pid)])


def left_of(pids: list[int]) -> list[int]:
    """Return the processes that are still there after the time in which all of them must end."""
    deadline = time.monotonic() + TIMEOUT_S + 2 * SLACK_S
    while (left := [pid for pid in pids if process_start(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
