"""Checkpoints are damaged: ranks are killed at every file operation of a save that overwrites one,
or one bit changes.

A killed save, in the foreground or background, must leave the old checkpoint or the new one whole.
Every reader must refuse a checkpoint of which a bit has changed. Left out: loss of power (what
fsync has promised counts as kept), and kills within one write, which only kills at random times can
meet.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch

from experiments.engine.ranks import RankError, run_ranks
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.training.assembly.model import build_model
from tests.support.faults import tiny_run
from tests.support.faults.tiny_run import LAST, NEW, OLD, WAYS

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def at_each_operation(act: Callable[[str], None]) -> None:
    """From now on, call act(what) before every operation by which this process changes files.

    They are found by Python's audit events, and by os.fsync and durable.exchange, which have none.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (
            event == "open" and isinstance(args[2], int) and args[2] & WRITING
        )
        if changes and not isinstance(args[0], int):
            act(f"{event} {os.fsdecode(args[0])}")

    fsync, exchange = os.fsync, durable.exchange

    def audited_fsync(fd: Any) -> None:
        act("os.fsync")
        fsync(fd)

    def audited_exchange(one: Path, other: Path) -> bool:
        act(f"exchange {one}")
        return exchange(one, other)

    sys.addaudithook(hook)
    os.fsync, durable.exchange = audited_fsync, audited_exchange


def save_over(
    rank: int,
    world_size: int,
    folder: Path,
    victim: str,
    background: bool,
    operation: int | None = None,
    after_s: float | None = None,
    steps: Sequence[int] = (OLD, NEW),
    dense: str = "replicated",
) -> dict[str, Any]:
    """Save each of the steps over the one before, and kill the victim ("first", "last" or "all"
    ranks) at an operation of the last save, or some seconds after its start. Return a surviving
    rank's file operations and its seconds.
    """
    trainer = tiny_run.one_step(world_size, folder, *WAYS[dense])
    pids = folder / "pids"
    pids.mkdir(parents=True, exist_ok=True)
    (pids / str(rank)).write_text(str(os.getpid()), encoding="utf-8")
    trainer.strategy.barrier()  # every rank has written its id, over that of an earlier call
    *before, last = steps
    for step in before:
        tiny_run.save_marked(trainer, folder / "checkpoints" / LAST, step)
    done: list[str] = []

    def note(what: str) -> None:
        if len(done) == operation:
            if victim == "all":
                for other in pids.iterdir():
                    if other.name != str(rank):
                        os.kill(int(other.read_text(encoding="utf-8")), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(what)

    is_victim = rank == (world_size - 1 if victim == "last" else 0)
    if is_victim:
        at_each_operation(note)
    if after_s is not None and (victim == "all" or is_victim):
        # the kernel ends the process, whatever it is doing
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, after_s)
    start = time.monotonic()
    tiny_run.save_marked(trainer, folder / "checkpoints" / LAST, last, background)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"operations": done, "seconds": time.monotonic() - start}


def killed(folder: Path, victim: str, background: bool = False, **when: Any) -> bool:
    """Run `save_over`. Return whether a rank was killed. when: its keywords."""
    try:
        run_ranks(partial(save_over, **when), 2, folder, victim, background)
    except RankError as error:
        if "ended without a report" not in str(error):
            raise
        return True
    return False


def inspect(rank: int, world_size: int, folders: list[Path]) -> list[dict[str, int]]:
    """Return what a new process finds of each checkpoint: 1 if lost, 1 if it mixes steps, the
    number of leftovers."""
    trainer = tiny_run.one_step(world_size, folders[0].parent / "inspect")
    found = []
    for folder in folders:
        lost = mixed = False
        try:
            durable.newest_good(folder)  # before the leftovers are removed
            durable.sweep(folder)
            path = durable.newest_good(folder)
            tiny_run.load_into(trainer, path)
        except (FileNotFoundError, durable.BrokenCheckpoint):
            lost = True
        else:
            steps = {
                float(value) for t in tiny_run.tensors(trainer).values() for value in t.unique()
            }
            mixed = steps not in ({OLD}, {NEW}) or steps != {durable.verify(path)}
        found.append(
            {"lost": int(lost), "mixed": int(mixed), "leftovers": len(os.listdir(folder)) - 1}
        )
    return found


def kill(points: int | None = None, random: int = 0, dense: str = "replicated") -> dict[str, int]:
    """Kill saves and inspect what is left. The options are those of the command `kill`; points
    None: all."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        kills: list[tuple[str, dict[str, Any]]] = []
        for background, victim in product((False, True), ("first", "last")):
            ranks = run_ranks(
                partial(save_over, dense=dense),
                2,
                root / f"{victim}-{background}",
                victim,
                background,
            )
            record = ranks[0 if victim == "first" else -1]
            operations = tiny_run.spread(range(len(record["operations"])), points)
            for who in (victim, "all") if victim == "first" else (victim,):
                kills += [(who, {"background": background, "operation": i}) for i in operations]
        draw = torch.Generator().manual_seed(0)
        for i in range(random):
            moment = torch.rand((), generator=draw).item() * 1.2 * record["seconds"]
            when = {"background": i % 2 == 1, "after_s": max(1e-4, moment)}
            kills.append((("first", "last", "all")[i % 3], when))

        folders, deaths = [], 0
        for i, (who, when) in enumerate(tiny_run.progress(kills, "killing")):
            died = killed(root / str(i), who, **when, dense=dense)
            if "operation" in when and not died:
                raise RuntimeError(
                    f"{who} survived operation {when['operation']}: operations differ between saves"
                )
            deaths += died
            folders.append(root / str(i) / "checkpoints")
        (found,) = run_ranks(inspect, 1, folders)
        totals = {key: sum(entry[key] for entry in found) for key in ("lost", "mixed", "leftovers")}
        return {"kill_points": len(kills), "killed": deaths, **totals}


def write_old(rank: int, world_size: int, folder: Path, dense: str = "replicated") -> None:
    tiny_run.save_marked(
        tiny_run.one_step(world_size, folder, *WAYS[dense]), folder / "checkpoints" / LAST, OLD
    )


def flip(count: int, dense: str = "replicated") -> dict[str, int]:
    """Flip random bits of a checkpoint. Return among others `refused`: how often the reader raised
    and named the file."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(write_old, 2, Path(name), dense)
        path, draw, refused = Path(name) / "checkpoints" / LAST, Random(0), 0
        model = build_model(tiny_run.tiny(1))
        load_model(path, model)
        files = sorted(path.iterdir())
        for _ in tiny_run.progress(range(count), "flipping"):
            file = draw.choice(files)
            whole = file.read_bytes()
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            try:
                load_model(path, model)
            except durable.BrokenCheckpoint as error:
                refused += str(file) in str(error)
            file.write_bytes(whole)
        load_model(path, model)
    return {"flips": count, "refused": refused}
