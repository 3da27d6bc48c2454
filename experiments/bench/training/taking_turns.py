"""The trainings of `bench train`: all are alive at once, each in its own processes and network, and
one runs at a time, in its turn of a few steps.

The first turn is warm-up: it is not timed, and in its last step the memory is measured. Validation
and checkpoints run at the beginning of the next turn and are not timed either.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.profiler import profile

from experiments.engine import links
from experiments.engine.profiles import allocated_peak, memory_profile
from experiments.engine.ranks import RankError, run_ranks
from scmoe.config.load import load_config
from scmoe.loads import CurrentLoad, Sizes, deal, load_of
from scmoe.moe.router import Router
from scmoe.planning.clock import median
from scmoe.planning.planner import Overlap
from scmoe.runs.seen import SeenRun
from scmoe.training.assembly.trainer import register_callback
from scmoe.training.callbacks.adaptive_schedule import AdaptiveSchedule
from scmoe.training.run.train import train

MOST_S = 8 * 3600.0  # of all turns together


class TrainingTurns(Callback):
    """Holds a training until its turn, and answers it with the medians of its steps: seconds, and
    those of them in MoE windows (planner.Overlap).

    turn: the rank's end of a pipe, on which the links' rate in Mbit/s comes, or None. ends: the
    numbers of steps after which the turns end. It answers at the end of a batch, so validation and
    checkpoints run untimed in the next turn. The windows' seconds are NaN in a turn in which none
    were measured, as with two batches in flight. peak_mb: of the last step of the first turn, in
    MiB beyond what is allocated before it.
    """

    def __init__(self, turn: Connection, ends: Sequence[int]) -> None:
        self.turn, self.ends = turn, ends
        self.begun: float | None = None
        self.step = 0
        self.steps_s: list[float] = []
        self.windows_s: list[float] = []
        self.overlap: Overlap | None = None  # of the last timed step
        self.memory: profile | None = None  # while it is measured
        self.peak_mb = 0.0

    def begin(self) -> None:
        links.set_rate(self.turn.recv())
        self.steps_s, self.windows_s = [], []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.begun is not None:
            return
        if trainer.global_step == self.ends[0] - 1:
            self.memory = memory_profile()
            self.memory.start()
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.note_windows(trainer)
        if trainer.global_step == self.step:  # more batches belong to this step
            return
        assert self.begun is not None
        self.steps_s.append(time.perf_counter() - self.begun)
        self.begun, self.step = None, trainer.global_step
        if self.memory is not None:
            self.memory.stop()
            self.peak_mb = allocated_peak(self.memory) / 2**20
            self.memory = None
        if self.step in self.ends:
            self.turn.send([median(self.steps_s), median(self.windows_s or [math.nan])])
            self.begin()

    def note_windows(self, trainer: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, AdaptiveSchedule) and callback.planner:
                overlap = callback.planner.overlap
                if overlap is not None and overlap is not self.overlap:
                    self.overlap = overlap
                    # one batch is timed
                    self.windows_s.append(trainer.accumulate_grad_batches * sum(overlap.seconds))


class Training:
    """A training in its own processes and network, which runs in its turns."""

    def __init__(self, pool: ThreadPoolExecutor, ranks: int, *what: Any) -> None:
        """Start it. what: config, words, load and ends for `trained`."""
        pipes = [Pipe() for _ in range(ranks)]
        self.turns = [ours for ours, _ in pipes]
        theirs = [end for _, end in pipes]
        self.found: Future[dict[str, Any]] = pool.submit(in_own_network, ranks, theirs, *what)

    def turn(self, mbit: float | None) -> list[float]:
        """Let it run until the end of its turn. Return what the slowest rank answers. Raises
        RankError."""
        try:
            for turn in self.turns:
                turn.send(mbit)
            return np.max([turn.recv() for turn in self.turns], axis=0).tolist()
        except (EOFError, ConnectionError):
            self.found.result()
            raise RankError("a training ended before its last turn") from None

    def finish(self) -> dict[str, Any]:
        for turn in self.turns:
            turn.send(None)
        return self.found.result()

    def stop(self) -> None:
        for turn in self.turns:
            turn.close()


def in_own_network(ranks: int, theirs: Sequence[Connection], *what: Any) -> dict[str, Any]:
    """Run in a thread for each training, so that each has a network."""
    try:
        links.enter_another()
        return run_ranks(trained, ranks, theirs, *what, timeout_s=MOST_S, own_links=True)[0]
    finally:
        for end in theirs:
            end.close()


class Loaded(Callback):
    """Lets every router of the model deal tokens by a load."""

    def __init__(self, routing: str) -> None:
        self.current = CurrentLoad(load_of(routing))

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        for router in (part for part in module.modules() if isinstance(part, Router)):
            sizes = Sizes(router.num_experts, router.top_k, dist.get_world_size())
            router.deal = deal(sizes, dist.get_rank(), self.current)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.current.step = trainer.global_step  # not the calls: recomputation calls a router twice


def trained(
    rank: int,
    world_size: int,
    turns: Sequence[Connection],
    config: str,
    words: Sequence[str],
    routing: str | None,
    ends: Sequence[int],
) -> dict[str, Any]:
    """Run on every rank; the caller uses rank 0's result."""
    held = TrainingTurns(turns[rank], ends)
    held.begin()
    register_callback("turns")(lambda: held)
    if routing is not None:
        register_callback("loaded")(partial(Loaded, routing))
        words = [*words, "callbacks.loaded={}"]
    with TemporaryDirectory() as folder:
        words = [*words, "callbacks.turns={}", "logger.mode=disabled"]
        if rank == 0:
            words.append(f"runs_dir={folder}")
        summary = train(load_config(config, words), quiet=True)
        if summary is None:
            return {}
        run = SeenRun(Path(summary["run_dir"]))
        dropped = [row["moe/drop_share"] for row in run.metrics if "moe/drop_share" in row]
        return {
            "curve": run.curve("val/loss"),
            "dropped": median(dropped or [0.0]),
            "peak_mb": held.peak_mb,
        }
