"""Faults that stop a run (numbers of docs: 13-16, 19, 26, 27, 31): every rank ends, soon, and says why.

Ranks are processes of run_ranks where one of them raises, and a real run of the train command where a process is
killed or stopped: run_ranks would end the others itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import sequences
from scmoe.config.fields import Config
from scmoe.moe.stream import MoEStream
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.dispatcher import AllToAllDispatcher, check_ceiling
from scmoe.parallel.job.debug import CompareCollectives, OrderError
from scmoe.parallel.job.lockstep import check_even
from scmoe.parallel.job.roll_call import LEFT_ALONE, roll_call
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.strategy import ExpertParallelStrategy
from scmoe.parallel.update.guard import Guard
from scmoe.testbed.ranks import RankError, run_ranks
from scmoe.training.build.data import build_datamodule
from scmoe.training.build.model import build_model, build_module
from scmoe.training.build.trainer import build_trainer
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.language_model import LanguageModel
from tests.support.trainings import tiny

pytestmark = [pytest.mark.dist, pytest.mark.faults]

ROOT = Path(__file__).parents[2]
MODEL = "position=pos2 strategy.ep_size=2"


def fit(config: Config, module: LanguageModel | None = None, data: Any = None) -> LanguageModel:
    module = module or build_module(config)
    trainer = build_trainer(config, [DataPosition()], [])
    trainer.fit(module, data or build_datamodule(config))
    return module


def failure(fn: Any, world_size: int, *args: Any) -> str:
    """What run_ranks says of ranks that must fail; it would say otherwise of one that hangs."""
    with pytest.raises(RankError) as caught:
        run_ranks(fn, world_size, *args, timeout_s=60)
    return str(caught.value)


# ---------------------------------------------------------------------- 14: how long a rank waits


def timeouts(rank: int, world_size: int, seconds: float) -> set[float]:
    """Of every process group that a run has."""
    config = tiny(f"{MODEL} strategy.timeout_s={seconds} strategy.debug_collectives=true", world_size)
    fit(config)
    groups = dist.distributed_c10d._world.pg_map
    assert {group.group_desc for group in groups} >= {"ep", "edp", "checkpoint", "control", "debug"}
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_14_no_group_waits_for_longer_than_it_was_told():
    """gloo would wait half an hour, and new groups do not take the time of the first one over."""
    assert run_ranks(timeouts, 2, 37.0) == [{37.0}, {37.0}]
    assert ExpertParallelStrategy()._timeout == timedelta(minutes=5)


# ---------------------------------------------------------------------- 13: callbacks that save after it


class Broken(RuntimeError):
    pass


def savers(how: str, folder: Path) -> list[Callback]:
    """A checkpoint of every second step, and another one after an exception."""
    if how == "save_on_exception":
        return [ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_last="link", save_on_exception=True)]
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
    trainer = build_trainer(config, [DataPosition(), *savers(how, folder)], [])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        try:
            trainer.fit(module, build_datamodule(config))
        except Broken as error:
            lines = [str(line.message) for line in said if "no checkpoint is saved" in str(line.message)]
            error.add_note(f"said {len(lines)} time(s): {lines[0]}")
            raise


@pytest.mark.parametrize("how", ["OnExceptionCheckpoint", "save_on_exception"])
@pytest.mark.parametrize("bad", [pytest.param(0, marks=pytest.mark.representative), 1])
def test_13_callbacks_that_save_after_an_exception_wait_for_nobody(bad, how, tmp_path):
    """The other rank is in a collective of training: all that saves would hang, and hide the error."""
    message = failure(raise_and_save, 2, bad, how, tmp_path)
    assert message.startswith(f"rank {bad} of 2 failed first:\nTraceback")
    assert "Broken: in step 3" in message and "another exception occurred" not in message
    assert "said 1 time(s): no checkpoint is saved after an exception: " in message
    left = {path.name: durable.verify(path) for path in tmp_path.iterdir()}
    last = {"last.ckpt": 2} if how == "save_on_exception" else {}
    assert left == {"step=2.ckpt": 2, **last}, "whole, and what linked to it still does"


# ---------------------------------------------------------------------- 13, 14: a real run, whose ranks are processes

# The train command, with a rank that fails. argv: how, that rank, where, in which call, then what the command takes.
FAILING = """
import importlib, inspect, os, sys
how, rank, place, call = sys.argv[1:5]
module, _, path = place.partition(":")
owner, calls = importlib.import_module(module), 0
*outer, name = path.split(".")
for part in outer:
    owner = getattr(owner, part)
healthy, static = getattr(owner, name), isinstance(inspect.getattr_static(owner, name), staticmethod)
def broken(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(call) and os.environ.get("LOCAL_RANK", "0") == rank:
        while how == "stuck":
            pass
        raise RuntimeError(f"rank {rank} is broken")
    return healthy(*args, **kwargs)
setattr(owner, name, staticmethod(broken) if static else broken)
from experiments.train import main
sys.exit(main(sys.argv[5:]))
"""
PHASES = {  # where a rank fails, and in which call of it
    "setup": ("scmoe.training.language_model:LanguageModel.configure_model", 1),
    "step": ("scmoe.training.language_model:LanguageModel.training_step", 4),
    "forward": ("scmoe.moe.experts:Experts.forward", 4),  # between dispatch and combine
    "backward": ("scmoe.moe.experts:_MLPsInTurn.backward", 3),
    "update": ("torch.optim:AdamW.step", 3),
    "validation": ("scmoe.training.language_model:LanguageModel.validation_step", 1),
    "save": ("scmoe.parallel.checkpoint.saving:dcp.save", 1),
}
TIMEOUT_S, LONG_S = 30.0, 100.0  # ranks must also have met by then, on a machine that does other work
ENDLESS = ("trainer.max_steps=1000000", "trainer.val_every=1000000", "trainer.checkpoint_every=1000000")
OFTEN = ("trainer.val_every=2", "trainer.checkpoint_every=3")
SLACK_S = 30.0  # for the interpreter's end and Lightning's observer, which looks every 5 s


def start(
    tmp_path: Path, *command: str, overrides: tuple[str, ...] = ENDLESS, timeout_s: float = TIMEOUT_S
) -> subprocess.Popen[str]:
    arguments = ["configs/debug.yaml", "trainer.devices=2", f"runs_dir={tmp_path}", f"strategy.timeout_s={timeout_s}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TORCHELASTIC_", "MASTER_"))}
    return subprocess.Popen(
        [sys.executable, *command, *arguments, *overrides],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_failing(
    tmp_path: Path, how: str, rank: int, phase: str, before: str = "", overrides: tuple[str, ...] = ENDLESS
) -> subprocess.Popen[str]:
    script = tmp_path / "failing.py"
    script.write_text(before + FAILING)
    place, call = PHASES[phase]
    timeout_s = LONG_S if how == "raises" else TIMEOUT_S  # which nobody waits for where connections close
    return start(tmp_path, str(script), how, str(rank), place, str(call), overrides=overrides, timeout_s=timeout_s)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def end(run: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


# Callbacks that save after an exception, in front of FAILING.
SAVING = """
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from scmoe.training.run import train
build_callbacks = train.build_callbacks
def and_more(config, run_dir):
    callbacks = build_callbacks(config, run_dir)
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.save_on_exception = True
    return [*callbacks, OnExceptionCheckpoint(config.runs_dir)]
train.build_callbacks = and_more
"""


FAILS = [(1, phase) for phase in PHASES] + [(0, "forward")]


@pytest.mark.parametrize(
    "rank, phase",
    [pytest.param(*fail, marks=[pytest.mark.representative] * (fail == (1, "forward"))) for fail in FAILS],
)
def test_13_a_rank_that_raises_ends_all_and_is_the_first_to_say_why(tmp_path, rank, phase):
    assert_all_end(start_failing(tmp_path, "raises", rank, phase, overrides=OFTEN), rank)


@pytest.mark.parametrize("rank", (0, 1))
def test_13_callbacks_that_save_after_an_exception_save_nothing_of_a_real_run(tmp_path, rank):
    assert_all_end(start_failing(tmp_path, "raises", rank, "step", SAVING), rank)
    assert not [*tmp_path.rglob("*.ckpt")]


def assert_all_end(run: subprocess.Popen[str], rank: int) -> None:
    """And the first traceback is that of the rank that is broken."""
    try:
        _, said = run.communicate(timeout=2 * LONG_S)  # until every rank has closed its stderr
    finally:
        end(run)
    assert run.returncode != 0
    before, _, after = said.partition(f"RuntimeError: rank {rank} is broken")
    assert after, said
    assert before.count("Traceback") == 1 and not LEFT_ALONE.search(before), said


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGSTOP))
@pytest.mark.parametrize("rank", (0, 1))
def test_14_a_rank_killed_or_stopped_ends_the_run(tmp_path, rank, how):
    run = start(tmp_path, "-m", "experiments.train")
    try:
        assert any(line.startswith("step 3/") for line in run.stderr), "the run does not train"
        (other,) = children(run.pid)
        os.kill(other if rank == 1 else run.pid, how)
        assert not left_of([run.pid, other]), "the survivor hangs, or has left the other behind"
    finally:
        end(run)
    said = run.stderr.read()
    if how == signal.SIGSTOP:
        assert re.search(r"[Tt]imed out", said), said
    assert re.search(rf"rank {1 - rank} waited at .*; roll call: no answer from rank {rank}", said), said


def call(rank: int, world_size: int, silent: list[int]) -> list[int] | None:
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    return None if rank in silent else roll_call(ParallelContext(rank, world_size, checkpoint_group=group))


@pytest.mark.representative
def test_14_a_roll_call_tells_who_is_missing():
    """And does so in its own time, not in the groups' half hour, which the watchdog of run_ranks would not wait for."""
    assert run_ranks(call, 4, [2, 3]) == [[2, 3], [], None, None]
    assert run_ranks(call, 2, [0]) == [None, [0]]
    assert run_ranks(call, 3, []) == [[], [], []]


@pytest.mark.parametrize("rank", (0, 1))
def test_14_a_rank_that_is_stuck_is_taken_along(tmp_path, rank):
    """Not stopped, not waiting: it computes for ever, and no signal of this job but SIGKILL would end it."""
    run = start_failing(tmp_path, "stuck", rank, "step")
    try:
        assert any(line.startswith("step 3/") for line in run.stderr), "the run does not train"
        assert not left_of([run.pid, *children(run.pid)])
    finally:
        end(run)


def left_of(pids: list[int]) -> list[int]:
    """Which of the processes are there still when all of them have had the time to end."""
    deadline = time.monotonic() + TIMEOUT_S + 2 * SLACK_S
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------- 15: collectives in another order


def swap_two_sums(rank: int, world_size: int, compared: bool) -> list[float]:
    dist.init_process_group("gloo")

    compare = CompareCollectives(timedelta(seconds=10))
    if compared:
        compare.install()
    loads, norms = torch.tensor([1.0]), torch.tensor([100.0])
    if rank == 0:
        dist.all_reduce(loads)
        dist.all_reduce(norms)
    else:
        dist.all_reduce(norms)
        dist.all_reduce(loads)
    compare.remove()
    return [loads.item(), norms.item()]


@pytest.mark.representative
def test_15_collectives_in_another_order_are_named():
    assert run_ranks(swap_two_sums, 2, False) == [[101.0, 101.0]] * 2, "the fault: wrong sums, and no word"
    message = failure(swap_two_sums, 2, True)
    assert "OrderError: collective 0 is not the same on all ranks; rank 0: all_reduce of torch.float32 (1,)" in message
    assert re.search(r"rank 0: \S+ .* at test_guards\.py:\d+; rank 1: \S+ .* at test_guards\.py:\d+", message)


def take_part(name: str, rank: int, world_size: int) -> None:
    """In one collective, with tensors and objects as they may be: the objects are of another kind on each rank."""
    x, both = torch.ones(2, 3), [torch.ones(2, 3) for _ in range(world_size)]
    thing: Any = (x, "a text")[rank]
    root = rank == 0
    arguments: dict[str, tuple[Any, ...]] = {
        "gather": (x, both if root else None),
        "scatter": (x, both if root else None),
        "all_gather": (both, x),
        "reduce_scatter": (x, both),
        "all_gather_into_tensor": (torch.ones(2 * world_size, 3), x),
        "reduce_scatter_tensor": (x, torch.ones(2 * world_size, 3)),
        "all_to_all": ([torch.ones(rank + 1, 3) for _ in both], both),
        "broadcast_object_list": ([thing],),
        "all_gather_object": ([None] * world_size, thing),
        "gather_object": (thing, [None] * world_size if root else None),
        "scatter_object_list": ([None], ["a", 1] if root else None),
    }
    getattr(dist, name)(*arguments[name])


OFTEN_FORGOTTEN = (
    *("gather", "scatter", "all_gather", "reduce_scatter", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("all_to_all", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
)
NOT_ON_GLOO = ("reduce_scatter", "all_to_all")


def swap_each(rank: int, world_size: int) -> dict[str, str]:
    """Each in turn, first by all ranks, then by rank 0 while the others come to a barrier; what is said of the last."""
    dist.init_process_group("gloo")
    compare, said = CompareCollectives(timedelta(seconds=10)), {}
    compare.install()
    for name in OFTEN_FORGOTTEN:
        if name not in NOT_ON_GLOO:
            take_part(name, rank, world_size)
        try:
            take_part(name, rank, world_size) if rank == 0 else dist.barrier()
        except OrderError as error:
            said[name] = str(error)
    compare.remove()
    return said


def test_15_every_kind_of_collective_is_watched():
    """Lightning's own are of objects; no false alarm where objects or numbers of rows differ."""
    for said in run_ranks(swap_each, 2):
        assert tuple(said) == OFTEN_FORGOTTEN
        for name, message in said.items():
            assert re.search(rf"rank 0: {name} .*at test_guards\.py:\d+; rank 1: barrier in group default", message)


def add_a_sum(rank: int, world_size: int, what: str) -> None:
    """Rank 1 takes part in a collective more, in its second step."""
    config = tiny(f"{MODEL} trainer.accumulate=1 strategy.debug_collectives=true strategy.timeout_s=20", world_size)
    module = build_module(config)

    def one_more() -> None:
        if module.global_step == 1:
            dist.all_reduce(torch.zeros(3)) if what == "all_reduce" else dist.barrier()

    if rank == 1:
        module.on_after_backward = one_more
    fit(config, module)


@pytest.mark.parametrize("what, says", [("all_reduce", r"all_reduce of torch\.float32 \(3,\)"), ("barrier", "barrier")])
def test_15_the_debug_mode_of_a_run_names_the_first_difference(what, says):
    message = failure(add_a_sum, 2, what)
    here = rf"rank 1: {says} in group default at test_guards\.py:\d+"
    assert re.search(rf"collective \d+ is not the same on all ranks; rank 0: \S+ .*; {here}", message), message


def trained_weights(rank: int, world_size: int, debug: bool) -> dict[str, Tensor]:
    config = tiny(f"{MODEL} strategy.debug_collectives={str(debug).lower()}", world_size)
    before = dist.all_reduce
    weights = {name: p.detach().clone() for name, p in fit(config).named_parameters()}
    assert dist.all_reduce is before, "taken out again"
    return weights


def test_15_comparing_changes_no_number():
    for plain, compared in zip(run_ranks(trained_weights, 2, False), run_ranks(trained_weights, 2, True), strict=True):
        assert all(torch.equal(plain[name], compared[name]) for name in plain)


# ---------------------------------------------------------------------- 16: uneven batches


def shorten(rank: int, world_size: int, loader: str) -> None:
    config = tiny(f"{MODEL} trainer.val_every=2", world_size)
    data = build_datamodule(config)
    whole = getattr(data, loader)

    def short() -> Any:
        batches = list(whole())
        return DataLoader(batches[: len(batches) - (rank == 1)], batch_size=None)

    setattr(data, loader, short)
    fit(config, data=data)


@pytest.mark.representative
@pytest.mark.parametrize("loader", ["train", "val"])
def test_16_uneven_batches_are_refused_before_the_first(loader):
    """Not at the timeout, minutes later, by a collective that knows nothing of batches."""
    message = failure(shorten, 2, f"{loader}_dataloader")
    counts = r"rank 0: (\d+); rank 1: (\d+)"
    found = re.search(rf"ValueError: ranks have different numbers of {loader} batches \({counts}\)", message)
    assert found and int(found[1]) == int(found[2]) + 1, message
    assert re.search(r"rank [01], later: ValueError: ranks have different numbers", message), "alike on both ranks"


def count_batches(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    context = ParallelContext(rank, world_size, control_group=dist.new_group(backend="gloo"))
    check_even("val", [3, float("inf")], context)  # the same on both, and a length that is not known
    check_even("val", [3, 4 + rank], context)


def test_16_each_loader_counts():
    message = failure(count_batches, 2)
    assert (
        "different numbers of val batches (rank 0: 3 + 4; rank 1: 3 + 5), allowed: the same number on each rank"
        in message
    )


# ---------------------------------------------------------------------- 19: a data worker dies


def break_worker(rank: int, world_size: int, how: str) -> None:
    config = tiny(f"{MODEL} trainer.max_steps=2 data.workers=1 strategy.timeout_s=10", world_size)
    data = build_datamodule(config)
    data.setup()
    (_, second), whole = data.train_dataloader().batch_sampler, sequences.TrainSequences.__getitem__
    fatal = second[1]

    def broken(self: Any, i: int) -> Any:  # in a worker alone: this process never reads a sample itself
        if i == fatal and how == "dies":
            os._exit(1)
        if i == fatal:
            raise RuntimeError("no such file")
        return whole(self, i)

    if rank == 1:
        sequences.TrainSequences.__getitem__ = broken
    try:
        fit(config, data=data)
    except RuntimeError as error:
        error.add_note(f"expected: {fatal}")
        raise


@pytest.mark.parametrize("how, says", [("dies", "worker .* exited unexpectedly"), ("raises", "no such file")])
def test_19_a_data_worker_that_fails_is_named_with_its_sample(how, says):
    message = failure(break_worker, 2, how)
    assert message.startswith("rank 1 of 2 failed first:")
    assert re.search(says, message)
    note = r"data worker 0 \(pid \d+\) was reading sample (\d+) of TrainSequences\n.*expected: \1\n"
    assert re.search(note, message), message


# ---------------------------------------------------------------------- 27: not a number


class Poisoned(LanguageModel):
    """In step 1, rank `bad` has a NaN or Inf at one place."""

    place, bad = "", 1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        self.weights = [p.detach().clone() for p in self.parameters()]
        here = batch_idx == 1 and self.parallel_context.rank == self.bad
        block, value = self.model.blocks[0], float("inf") if "inf" in self.place else float("nan")
        hooks = []
        if here and self.place.startswith("output"):
            target = block.moe.experts
            hooks.append(target.register_forward_hook(lambda m, a, out: out * value, prepend=True))
        if here and self.place.startswith("backward"):
            block.tap_norm.register_full_backward_pre_hook(lambda m, g: (g[0] * value,))
        result = super().training_step(batch, batch_idx)
        for hook in hooks:
            hook.remove()
        if here and self.place.startswith("loss"):
            result["loss"] = result["loss"] + torch.tensor(value)  # leaves all gradients as they are
        return result


class NotClipped(Poisoned):
    """Leaves clipping to a Trainer that does not clip, as many modules do."""

    configure_gradient_clipping = LightningModule.configure_gradient_clipping


class ByHand(Poisoned):
    """Steps its optimizer itself, and clips before that or does not."""

    def __init__(self, *args: Any, clip: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization, self.clip = False, clip

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        result, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(result["loss"])  # type: ignore[arg-type]
        if self.clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        return result


class PastTheStrategy(Poisoned):
    """Clips by the norm of what this rank has."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


CLIPS = {
    "by the module": Poisoned,
    "by nobody": NotClipped,
    "by value": NotClipped,
    "by hand": ByHand,
    "past the strategy": PastTheStrategy,
}


def poison(rank: int, world_size: int, place: str, clip: str = "by the module") -> None:
    config = tiny(f"position=pos2 trainer.accumulate=1 strategy.ep_size={world_size}", world_size)
    module = CLIPS[clip](lambda context: build_model(config, context), max_steps=3)
    module.place, module.bad = place, world_size - 1
    trainer = build_trainer(config, [DataPosition()], [])
    if clip == "by value":
        trainer.gradient_clip_val, trainer.gradient_clip_algorithm = 0.5, GradClipAlgorithmType.VALUE
    try:
        trainer.fit(module, build_datamodule(config))
    except (FloatingPointError, RuntimeError) as error:
        same = all(torch.equal(p, old) for p, old in zip(module.parameters(), module.weights, strict=True))
        error.add_note(f"weights as they were: {same}")
        raise


PLACES = {
    "output": "output of model.blocks.0.moe.experts",
    "output inf": "output of model.blocks.0.moe.experts",
    "backward": "gradient into model.blocks.0.tap_norm",
    "loss": "loss",
    "loss inf": "loss",
}


@pytest.mark.representative
@pytest.mark.parametrize("place", PLACES)
def test_27_a_number_that_is_not_finite_stops_all_ranks_before_the_update(place):
    message = failure(poison, 2, place)
    assert re.search(rf"first not finite: (rank 0: [^;]*; )?rank 1: {re.escape(PLACES[place])}", message), message
    assert message.count("weights as they were: True") == 2 or message.count("later: weights as they were: True") == 1


@pytest.mark.parametrize("clip", ["by nobody", "by value"])
def test_27_a_module_that_does_not_clip_by_norm_is_watched_too(clip):
    message = failure(poison, 2, "output", clip)
    assert re.search(rf"first not finite: (rank 0: [^;]*; )?rank 1: {PLACES['output']}", message), message
    assert "weights as they were: True" in message and "weights as they were: False" not in message


@pytest.mark.representative
@pytest.mark.parametrize("place", ["output", "loss inf"])
def test_27_a_module_that_steps_by_hand_is_watched_too(place):
    message = failure(poison, 2, place, "by hand")
    assert re.search(rf"first not finite: (rank 0: [^;]*; )?rank 1: {re.escape(PLACES[place])}", message), message
    assert "weights as they were: True" in message and "weights as they were: False" not in message


def clipped(rank: int, world_size: int, by_hand: bool, clip: float | None) -> list[Tensor]:
    """How the weights end, with clipping by the module's own hand or by the Trainer."""
    config = tiny(f"position=pos2 trainer.accumulate=1 strategy.ep_size={world_size}", world_size)
    cls, own = (ByHand, {"clip": clip}) if by_hand else (NotClipped, {})
    module = cls(lambda context: build_model(config, context), max_steps=3, lr=0.01, **own)
    trainer = build_trainer(config, [DataPosition()], [])
    if not by_hand:
        trainer.gradient_clip_val = clip
    trainer.fit(module, build_datamodule(config))
    return [p.detach().clone() for p in module.parameters()]


def test_27_what_is_clipped_by_hand_takes_the_global_norm():
    by_hand, by_trainer, by_nobody = (
        run_ranks(clipped, 2, *how) for how in ((True, 0.05), (False, 0.05), (True, None))
    )
    for a, b, c in zip(by_hand, by_trainer, by_nobody, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_27_a_module_that_clips_by_other_means_is_refused(world_size):
    message = failure(poison, world_size, "", "past the strategy")
    assert "RuntimeError: PastTheStrategy.configure_gradient_clipping did not call self.clip_gradients" in message
    assert "call self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm) there" in message
    assert "weights as they were: True" in message and "weights as they were: False" not in message


def test_27_one_process_too():
    assert "first not finite: rank 0: output of model.blocks.0.moe.experts" in failure(poison, 1, "output")


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_27_good_steps_leave_nothing_behind_and_ask_nobody():
    module = Counted()
    guard = Guard(module)
    with patch.object(dist, "all_gather_object") as gather:
        for _ in range(3):
            module(torch.ones(1, 2)).sum().backward()
            guard.note_loss(torch.tensor(1.0))
            assert float(guard.loss_as_zero()) == 0.0
            assert len(guard.trace) == 3
            guard.check(torch.tensor(1.0), ParallelContext())
            assert (guard.trace, guard.losses) == ([], [])
    assert not gather.called


# ---------------------------------------------------------------------- 31: all tokens to one expert


def all_to_one(rank: int, world_size: int, ceiling: str) -> None:
    config = tiny(f"position=pos2 moe.dropless_ceiling={ceiling} strategy.ep_size=2", world_size)
    module = build_module(config)
    configure = module.configure_model

    def collapsed() -> None:
        configure()
        for block in module.model.blocks:
            with torch.no_grad():
                block.tap_norm.weight[0], block.tap_norm.bias[0] = 0.0, 20.0
                block.moe.router.gate.weight[:, 0] = torch.tensor([5.0] + [-5.0] * 7)

    module.configure_model = collapsed
    try:
        fit(config, module)
    finally:
        assert all(isinstance(m.dispatcher, AllToAllDispatcher) for m in module.modules() if isinstance(m, MoEStream))


@pytest.mark.representative
def test_31_a_ceiling_ends_all_ranks_before_memory_is_gone():
    message = failure(all_to_one, 2, "1.5")
    assert re.search(r"CeilingError: rank 0 of .* would receive \d+ rows, allowed: 1.5 x the fair share", message)
    assert re.search(r"rank [01], later: .*CeilingError: rank 0 ", message), "alike on both ranks"
    run_ranks(all_to_one, 2, "2")  # all rows on one of two ranks are twice the fair share, and no more
    run_ranks(all_to_one, 2, "null")


def test_31_the_ceiling_is_of_the_fair_share():
    check_ceiling([15, 5], 1.5)
    check_ceiling([0, 0], 1.0)
    with pytest.raises(MemoryError, match=r"rank 1 .* would receive 16 rows, allowed: 1.5 x the fair share of 10 "):
        check_ceiling([4, 16], 1.5)
