"""Runs a function in N processes on this machine, with torchrun's variables, and returns the N
results.

Processes are forked from a server that has imported torch, Lightning and this library, so a rank
starts in 0.1 s. They are not forked from the caller: its autograd threads and locks do not survive
a fork. The caller hosts the store at which the ranks meet, so no other program can take its port. A
rank ends when the caller's end of its pipe closes.
"""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.engine import links
from experiments.engine.isolated import end
from scmoe.parallel.mesh import use_loopback_for_gloo

PRELOADED = [
    "torch",
    "torch.distributed",
    "lightning.pytorch",
    "scmoe.training.assembly.trainer",
    __name__,
]
GRACE_S = 0.5


class RankError(RuntimeError):
    """A rank raised, ended without a result, or took too long. The message starts with the first
    failure."""


class _Report(NamedTuple):
    """What a rank sends at its end.

    time_s: on the machine's monotonic clock. failure: a traceback.
    """

    time_s: float
    result: Any
    failure: str | None


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    own_links: bool = False,
    grace_s: float = GRACE_S,
) -> list[Any]:
    """Return [fn(rank, world_size, *args) for each rank], each run in its own process with one
    torch thread.

    fn: a function of a module; a Trainer or `init_process_group` in it joins the ranks. args and
    results are pickled. No rank ends before all have their results. Raises RankError. Every process
    has ended by then, and on return. own_links: each rank in its own network namespace (links.py);
    call `links.enter` first. Else on the loopback device. grace_s: after a first failure, how
    long others that failed at the same time may take to report.
    """
    assert links.inside() or not own_links
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            rank_args = theirs, rank, world_size, store.port, own_links, fn, *args
            process = context.Process(target=_run_rank, args=rank_args)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
            if own_links:
                _attach(ours, process.pid, rank)
        return _collect(pipes, timeout_s, grace_s)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            end(process)
            process.close()


def run_alone(fn: Callable[..., Any], *args: Any) -> Any:
    """Return fn(0, 1, *args), run in this process as the only rank. Call it once in a process: its
    group stays."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _set_variables(0, 1, "127.0.0.1", store.port)
    return fn(0, 1, *args)


def say_once(line: str) -> None:
    """Print a line of progress on rank 0. Other ranks print nothing."""
    if dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def _attach(pipe: Connection, pid: int | None, rank: int) -> None:
    try:
        pipe.recv_bytes()  # the rank has left the caller's namespace
    except EOFError:
        raise RankError(f"rank {rank} ended before it had a network namespace") from None
    assert pid is not None
    pipe.send_bytes(links.attach(pid, rank).encode())


def _collect(pipes: list[Connection], timeout_s: float, grace_s: float) -> list[Any]:
    reports: dict[int, _Report] = {}
    deadline = time.monotonic() + timeout_s
    while len(reports) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in reports}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        failed = any(report.failure for report in reports.values())
        if not ready and not failed:
            raise RankError(
                f"no result within {timeout_s:g} s from rank"
                f" {', '.join(map(str, waiting.values()))}"
            )
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            reports[waiting[pipe]] = _receive(pipe)
        if not failed and any(report.failure for report in reports.values()):
            deadline = time.monotonic() + grace_s
    if failures := {rank: report for rank, report in reports.items() if report.failure}:
        first, *later = sorted(failures, key=lambda rank: failures[rank].time_s)
        lines = [f"rank {first} of {len(pipes)} failed first:\n{failures[first].failure}"]
        lines += [
            f"rank {rank}, later: {str(failures[rank].failure).splitlines()[-1]}" for rank in later
        ]
        raise RankError("\n".join(lines))
    return [reports[rank].result for rank in range(len(pipes))]


def _receive(pipe: Connection) -> _Report:
    try:
        return pickle.loads(pipe.recv_bytes())  # safe: only the rank can write into its pipe
    except (EOFError, ConnectionError):
        # peers fail later
        return _Report(0.0, None, "the process ended without a report: killed, or out of memory")


def _run_rank(
    pipe: Connection, rank: int, world_size: int, port: int, own_links: bool, fn: Any, *args: Any
) -> None:
    from scmoe.lightning.seam.launch import set_rank_without_trainer

    os.setsid()
    if own_links:
        links.leave()
        pipe.send_bytes(b"left")
        links.bring_up(rank, pipe.recv_bytes().decode())
    multiprocessing.set_start_method(None, force=True)  # data workers start in the usual way
    threading.Thread(target=_end_with_caller, args=(pipe,), daemon=True).start()
    address = links.BRIDGE_ADDRESS if own_links else "127.0.0.1"
    _set_variables(rank, world_size, address, port)
    torch.set_num_threads(1)
    set_rank_without_trainer(rank)
    try:
        result = fn(rank, world_size, *args)
        report = _dumps(_Report(time.monotonic(), result, None))
    except BaseException:
        report = pickle.dumps(_Report(time.monotonic(), None, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(report)
    threading.Event().wait()  # until the caller closes the pipe


class _Pickler(pickle.Pickler):
    """Writes a tensor as its bytes. Torch's own way makes a file in memory for each, which takes
    ten times as long."""

    def reducer_override(self, value: Any) -> Any:
        if (
            type(value) is not Tensor
            or value.requires_grad
            or value.layout != torch.strided
            or value.numel() == 0
        ):
            return NotImplemented
        data = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return _tensor, (data, value.dtype, value.shape)


def _dumps(report: _Report) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(report)
    return file.getvalue()


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _set_variables(rank: int, world_size: int, address: str, port: int) -> None:
    """Set torchrun's variables, as on one machine."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GROUP_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    os.environ.update(
        TORCHELASTIC_RUN_ID="ranks",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    use_loopback_for_gloo()


def _end_with_caller(pipe: Connection) -> None:
    """End this rank when the pipe closes; the caller sends nothing through it."""
    wait([pipe])
    os.killpg(0, signal.SIGKILL)
