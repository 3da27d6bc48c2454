"""Work that every rank does at a save or a load: no rank waits for one that has given up."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from scmoe.parallel.checkpoint.durable import MissingCheckpoint
from scmoe.parallel.mesh import Mesh


@contextmanager
def same_error_on_all_ranks(mesh: Mesh, group: Any = None) -> Iterator[None]:
    """Raise on every rank what the first of them raises inside.

    A rank that is stuck inside ends the others after the timeout. There must be no collective
    inside.

    group: in which ranks ask each other; None: `checkpoint_group`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    _raise_first(mesh, failure, group or mesh.checkpoint_group)


def together(mesh: Mesh, work: Callable[[], Any]) -> None:
    """Do long work on every rank, each its own, and raise everywhere what the first one raises.

    Ranks ask each other every second who still works, so the work may take longer than a
    collective's timeout.
    """
    failures: list[Exception] = []

    def do() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=do, name="together", daemon=True)
    thread.start()
    done = torch.zeros(1, dtype=torch.int64)
    while not done:
        thread.join(timeout=1)
        done.fill_(not thread.is_alive())
        dist.all_reduce(done, dist.ReduceOp.MIN, group=mesh.checkpoint_group)
    _raise_first(mesh, failures[0] if failures else None, mesh.checkpoint_group)


def in_background(work: Callable[[], None]) -> Future[None]:
    """Do work in a thread, which does not keep the process from ending."""
    done: Future[None] = Future()

    def do() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # as dcp's CheckpointException is
            done.set_exception(error)

    threading.Thread(target=do, name="checkpoint", daemon=True).start()
    return done


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise MissingCheckpoint inside where the checkpoint is gone, as a run that still trains
    removes older ones, and OSError for another failure."""
    try:
        yield
    except dcp.CheckpointException as error:  # a BaseException
        kind = OSError if path.exists() else MissingCheckpoint
        raise kind(f"{path} cannot be read: {first_failure(error)}") from None


def first_failure(error: dcp.CheckpointException) -> str:
    """Return the rank with the lowest number that has failed, and why."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _raise_first(mesh: Mesh, failure: Exception | None, group: Any) -> None:
    """Raise the first rank's failure on every rank. Every rank must call it."""
    sent: Exception | None = failure
    if failure is not None and not isinstance(failure, (OSError, ValueError, TypeError)):
        # a type of a user may not survive the way
        sent = RuntimeError(f"{type(failure).__name__}: {failure}")
    failures: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(failures, sent, group=group)
    if failure is not None:
        failures[mesh.rank] = failure  # with its traceback, which a copy has not
    for first in failures:
        if first is not None:
            raise first
