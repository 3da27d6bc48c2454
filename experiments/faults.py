"""What checkpoints survive: `python -m experiments.faults kill | flip | resume | reshard` (faults 1-10 of our list).

Real runs of a tiny model in real processes. kill: ranks are killed at every file operation of a save that overwrites
a checkpoint, in the foreground and beside training. flip: a byte of a checkpoint changes. resume: a run is broken off
at a step and goes on. reshard: a checkpoint of one EP degree is read at another. The last line on standard output is
JSON.

Where to kill is told by Python's audit events, and by os.fsync, which has none. Left out: loss of power (what fsync
has promised is taken as kept) and kills within one write, which only `kill --random` can meet.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_checkpoint, load_model
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.parallel.checkpoint.state import model_state, optimizer_state
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.shards import expert_parameters
from scmoe.testbed.ranks import RankError, run_ranks
from scmoe.training.build.data import build_datamodule
from scmoe.training.build.model import build_model, build_module
from scmoe.training.build.trainer import build_callbacks, build_trainer, seed_everything

EXPERTS = 8
NEVER = "1000000"
TINY = (
    *("model.layers=2", "model.dim=8", "model.heads=2", "model.ffn_dim=8", "model.dropout=0.1"),
    *(f"moe.num_experts={EXPERTS}", "moe.top_k=2", "moe.noisy=true"),
    *("data.name=synthetic", "data.vocab_size=16", "data.seq_len=8", "data.global_batch_size=16"),
    *("optim.lr=0.01", "optim.warmup_steps=2", "logger.mode=disabled"),
    *("trainer.accelerator=cpu", "trainer.threads=1", "trainer.progress=false", f"trainer.val_every={NEVER}"),
    *("strategy.timeout_s=60",),
)
LAST = "last.ckpt"
OLD, NEW, NEXT = 1, 2, 3  # steps: of the checkpoint that is there, of the one saved over it, of training beside it
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("kill", help="SIGKILL rank 0, the last rank or all during a save")
    command.add_argument("--points", type=count_or_all, default=None, help="all, or how many operations per victim")
    command.add_argument("--random", type=int, default=0, help="so many kills at random times as well")
    command = commands.add_parser("flip", help="flip a random bit of a checkpoint")
    command.add_argument("--count", type=int, default=1000)
    command = commands.add_parser("resume", help="go on from a step, on one rank and on two, workers 0 and 2")
    command.add_argument("--steps", type=count_or_all, default=None, help="all, or how many steps to go on from")
    commands.add_parser("reshard", help="write at one EP degree, read at another")
    options = vars(parser.parse_args(arguments))
    verbs: dict[str, Callable[..., dict[str, int]]] = {"kill": kill, "flip": flip, "resume": resume, "reshard": reshard}
    print(json.dumps(verbs[options.pop("what")](**options)))
    return 0


def count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """count of the items, from the first to the last; None: all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    return track(items, what, console=Console(stderr=True), transient=True)


# ---------------------------------------------------------------------- a tiny run


def tiny(world_size: int, *overrides: str) -> Config:
    return load(None, [*TINY, f"trainer.devices={world_size}", *overrides])


def fit(config: Config, run_dir: Path, resume_from: Path | None = None) -> Any:
    """A run of this rank; its Trainer. Each of its checkpoints is kept."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    seed_everything(config)
    callbacks = build_callbacks(config, run_dir)
    for callback in callbacks:
        if hasattr(callback, "save_top_k"):
            callback.save_top_k = -1
    trainer = build_trainer(config, callbacks, [])
    trainer.fit(build_module(config), build_datamodule(config), ckpt_path=resume_from, weights_only=True)
    return trainer


def one_step(world_size: int, run_dir: Path) -> Any:
    """The Trainer of a run over its one step, with weights and AdamW's state to save or to read into."""
    return fit(tiny(world_size, "trainer.max_steps=1", f"trainer.checkpoint_every={NEVER}"), run_dir)


def tensors(trainer: Any) -> dict[str, Tensor]:
    """This rank's weights, and AdamW's state of each as `name/key`."""
    module = trainer.lightning_module
    named = {name: p.detach() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        named.update({f"{name}/{key}": value for key, value in trainer.optimizers[0].state[p].items()})
    return named


def state(trainer: Any, step: int) -> dict[str, Any]:
    """What of Lightning's checkpoint dictionary a save must have."""
    module, context = trainer.lightning_module, trainer.strategy.context
    return {
        "global_step": step,
        "state_dict": model_state(module, context),
        "optimizer_states": [optimizer_state(module, trainer.optimizers[0], context)],
    }


def save(trainer: Any, path: Path, step: int) -> None:
    Saving(path, state(trainer, step), trainer.strategy.context, background=False).finish()


def mark(trainer: Any, step: int) -> None:
    """Makes every number of every tensor equal to the step."""
    for t in tensors(trainer).values():
        t.fill_(step)


def save_marked(trainer: Any, path: Path, step: int, background: bool = False) -> None:
    """background: training has gone on to NEXT while the checkpoint was being written."""
    mark(trainer, step)
    saving = Saving(path, state(trainer, step), trainer.strategy.context, background)
    if background:
        mark(trainer, NEXT)
    saving.finish()


# ---------------------------------------------------------------------- kill


def at_each_operation(act: Callable[[str], None]) -> None:
    """From now on act(what) comes before every operation by which this process changes files, whoever calls it."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)
        if changes and not isinstance(args[0], int):
            act(f"{event} {os.fsdecode(args[0])}")

    fsync = os.fsync

    def audited_fsync(fd: Any) -> None:
        act("os.fsync")
        fsync(fd)

    sys.addaudithook(hook)
    os.fsync = audited_fsync


def save_over(
    rank: int,
    world_size: int,
    folder: Path,
    victim: str,
    background: bool,
    operation: int | None = None,
    after_s: float | None = None,
    steps: Sequence[int] = (OLD, NEW),
) -> dict[str, Any]:
    """Saves each of the steps over the one before. victim ("first", "last", "all") is killed at an operation of the
    last save, or some seconds after its start. Returns what it did to files and how long that took, if it lives."""
    trainer = one_step(world_size, folder)
    pids = folder / "pids"
    pids.mkdir(exist_ok=True)
    (pids / str(rank)).write_text(str(os.getpid()))
    trainer.strategy.barrier()  # all are there, and none of an earlier call
    *before, last = steps
    for step in before:
        save_marked(trainer, folder / "checkpoints" / LAST, step)
    done: list[str] = []

    def note(what: str) -> None:
        if len(done) == operation:
            if victim == "all":
                for other in pids.iterdir():
                    if other.name != str(rank):
                        os.kill(int(other.read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(what)

    if rank == (world_size - 1 if victim == "last" else 0):
        at_each_operation(note)
    if after_s is not None and (victim == "all" or rank == (world_size - 1 if victim == "last" else 0)):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, wherever it is
        signal.setitimer(signal.ITIMER_REAL, after_s)
    start = time.monotonic()
    save_marked(trainer, folder / "checkpoints" / LAST, last, background)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"operations": done, "seconds": time.monotonic() - start}


def killed(folder: Path, victim: str, background: bool = False, **when: Any) -> bool:
    """Whether a rank died of it. when: as save_over has it."""
    folder.mkdir(exist_ok=True)
    try:
        run_ranks(partial(save_over, **when), 2, folder, victim, background)
    except RankError as error:
        if "ended without a word" not in str(error):
            raise
        return True
    return False


def inspect(rank: int, world_size: int, folders: list[Path]) -> list[dict[str, int]]:
    """What is left of checkpoints, told by a fresh process: lost, mixed, leftovers (0 or more of each)."""
    trainer = one_step(world_size, folders[0].parent / "inspect")
    found = []
    for folder in folders:
        try:
            durable.newest_good(folder)  # before anybody has tidied up
            durable.sweep(folder)
            path = durable.newest_good(folder)
            load_checkpoint(path, trainer.lightning_module, trainer.optimizers, trainer.strategy.context)
        except (FileNotFoundError, durable.BrokenCheckpoint):
            found.append({"lost": 1, "mixed": 0, "leftovers": len(os.listdir(folder)) - 1})
            continue
        steps = {float(value) for t in tensors(trainer).values() for value in t.unique()}
        found.append(
            {
                "lost": 0,
                "mixed": int(steps not in ({OLD}, {NEW}) or steps != {durable.verify(path)}),
                "leftovers": len(os.listdir(folder)) - 1,
            }
        )
    return found


def kill(points: int | None, random: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        plan: list[tuple[str, dict[str, Any]]] = []
        for background, victim in product((False, True), ("first", "last")):
            folder = root / f"{victim}-{background}"
            folder.mkdir()
            record = run_ranks(save_over, 2, folder, victim, background)[0 if victim == "first" else -1]
            operations = range(len(record["operations"]))
            for who in (victim, "all") if victim == "first" else (victim,):
                plan += [(who, {"background": background, "operation": i}) for i in spread(operations, points)]
        draw = torch.Generator().manual_seed(0)
        for i in range(random):
            moment = torch.rand((), generator=draw).item() * 1.2 * record["seconds"]
            when = {"background": i % 2 == 1, "after_s": max(1e-4, moment)}
            plan.append((("first", "last", "all")[i % 3], when))

        folders, deaths = [], 0
        for i, (who, when) in enumerate(progress(plan, "killing")):
            died = killed(root / str(i), who, **when)
            if "operation" in when and not died:
                raise RuntimeError(f"{who} lived on at operation {when['operation']}: operations differ between saves")
            deaths += died
            folders.append(root / str(i) / "checkpoints")
        (found,) = run_ranks(inspect, 1, folders)
        totals = {key: sum(entry[key] for entry in found) for key in ("lost", "mixed", "leftovers")}
        return {"kill_points": len(plan), "killed": deaths, **totals}


# ---------------------------------------------------------------------- flip


def write_old(rank: int, world_size: int, folder: Path) -> None:
    save_marked(one_step(world_size, folder), folder / "checkpoints" / LAST, OLD)


def flip(count: int) -> dict[str, int]:
    """refused: the reader has raised and named the file."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(write_old, 2, Path(name))
        path, draw, refused = Path(name) / "checkpoints" / LAST, random.Random(0), 0
        model = build_model(tiny(1), ParallelContext())
        load_model(path, model, "model.")
        files = sorted(path.iterdir())
        for _ in progress(range(count), "flipping"):
            file = draw.choice(files)
            whole = file.read_bytes()
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            try:
                load_model(path, model, "model.")
            except durable.BrokenCheckpoint as error:
                refused += str(file) in str(error)
            file.write_bytes(whole)
        load_model(path, model, "model.")
    return {"flips": count, "refused": refused}


# ---------------------------------------------------------------------- resume

RESUME_STEPS = 6


def run(rank: int, world_size: int, workers: int, folder: Path, resume_from: list[Path]) -> list[dict[str, Any]]:
    """How straight runs end, or runs that go on from checkpoints: tensors, learning rate, position in the data.

    They validate after every step, which begins data loaders anew in between.
    """
    config = tiny(
        world_size,
        *("trainer.accumulate=2", f"trainer.max_steps={RESUME_STEPS}", "trainer.checkpoint_every=1"),
        *(f"data.workers={workers}", f"strategy.ep_size={world_size}"),
        *("trainer.val_every=1", "data.val_sequences=16"),
    )
    ends = []
    for i, path in enumerate(resume_from or [None]):
        trainer = fit(config, folder / str(i), path)
        ends.append(
            {
                **{name: t.clone() for name, t in tensors(trainer).items()},
                "lr": torch.tensor(trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64),
                "consumed": torch.tensor(trainer.datamodule.consumed_samples),
            }
        )
    return ends


def resume(steps: int | None, worlds: Sequence[int] = (1, 2), workers: Sequence[int] = (0, 2)) -> dict[str, int]:
    compared = bit_equal = 0
    for world_size, loaders in progress([(w, n) for w in worlds for n in workers], "resuming"):
        with tempfile.TemporaryDirectory() as name:
            straight = run_ranks(run, world_size, loaders, Path(name) / "straight", [])
            saved = [Path(name) / "straight/0/checkpoints" / f"step={i}.ckpt" for i in range(1, RESUME_STEPS)]
            saved = spread(saved, steps)
            resumed = run_ranks(run, world_size, loaders, Path(name) / "resumed", saved)
        for i in range(len(saved)):
            compared += 1
            bit_equal += all(same(ends[i], end) for ends, (end,) in zip(resumed, straight, strict=True))
    return {"compared": compared, "bit_equal": bit_equal}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


# ---------------------------------------------------------------------- reshard


def write_whole(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Saves what one step has left, moments and experts all different; returns it."""
    trainer = one_step(world_size, folder)
    save(trainer, folder / "checkpoints" / LAST, OLD)
    return shards(trainer)


def read_all(rank: int, world_size: int, folder: Path, paths: list[Path]) -> list[dict[str, Any]]:
    trainer, found = one_step(world_size, folder), []
    for path in paths:
        for t in tensors(trainer).values():
            t.fill_(-1)
        load_checkpoint(path, trainer.lightning_module, trainer.optimizers, trainer.strategy.context)
        found.append(shards(trainer))
    return found


def shards(trainer: Any) -> dict[str, Any]:
    experts = {name for name, _ in expert_parameters(trainer.lightning_module)}
    return {"experts": experts, **{name: t.clone() for name, t in tensors(trainer).items()}}


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Experts of all ranks, put together by their global ids; the rest must be alike on all."""
    together = {}
    for name, t in ranks[0].items():
        if name == "experts":
            continue
        if name.split("/")[0] in ranks[0]["experts"] and t.dim():
            together[name] = torch.cat([rank[name] for rank in ranks])
            assert len(together[name]) == EXPERTS
        else:
            assert all(torch.equal(rank[name], t) for rank in ranks), f"replicas of {name} differ"
            together[name] = t
    return together


def reshard(degrees: Sequence[int] = (1, 2, 4, 8)) -> dict[str, int]:
    """Every EP degree on as many ranks."""
    pairs = equal = 0
    with tempfile.TemporaryDirectory() as name:
        folders = {ep: Path(name) / f"ep{ep}" for ep in degrees}
        written = [whole(run_ranks(write_whole, ep, folder)) for ep, folder in folders.items()]
        paths = [folder / "checkpoints" / LAST for folder in folders.values()]
        for ep in progress(degrees, "reading"):
            ranks = run_ranks(read_all, ep, folders[ep] / "read", paths)
            for i, expected in enumerate(written):
                pairs += 1
                equal += same(whole([found[i] for found in ranks]), expected)
    return {"pairs": pairs, "equal": equal}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
