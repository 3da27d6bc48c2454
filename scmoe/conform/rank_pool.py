"""Processes on this machine that answer questions: n ranks of gloo, started once and asked many
times.

A rank that raises, hangs or ends costs one question: all n are ended, and the next question starts
new ones. A rank that has raised ends, as in a job, so that its peers notice. Ranks have torchrun's
variables, so that a library that reads them finds a usual job. They are forked from a server that
has imported torch; what they print goes into a file.
"""

import multiprocessing
import os
import pickle
import queue
import shutil
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scmoe.config.leaves import ConfigError
from scmoe.conform import plays
from scmoe.conform.adapter import Adapter, Group, Make, NotAsked
from scmoe.conform.oracle import plain_adapter
from scmoe.conform.plain import Weights
from scmoe.conform.source import make_of

START_S = 300.0  # more for the first play of a layer, whose file and libraries are imported then
OTHER_RANKS_S = 3.0  # after a first failure, how long other ranks may take to fail too
NO_LAYER = "no layer"
ENDED = "the process ended without a report"
LAST_LINES = 5  # of what ranks have printed, where one ended without a word


class PlayCall(NamedTuple):
    """One play of one layer. source: as of `make_of`. dtype: its name. plain: play the layer's
    formula. order, pieces: as of `Seat`."""

    source: str
    play: str
    dtype: str
    plain: bool = False
    order: tuple[int, ...] | None = None
    pieces: int = 1
    arguments: tuple[str, ...] = ()


class Played(NamedTuple):
    """What came of a play. outcome: "played", with a record of each rank, or "not asked",
    "crashed" or "timed out", with the reason."""

    outcome: str
    records: tuple[plays.Record, ...] = ()
    why: str = ""
    silent: tuple[int, ...] = ()  # ranks that gave no answer


class RankPool:
    """`size` ranks, of which `ep_size` neighbours share one set of experts. preloaded: modules that
    the server imports, so that ranks need not."""

    def __init__(self, size: int, ep_size: int, preloaded: Sequence[str] = ()) -> None:
        self.size = size
        self.ep_size = ep_size
        self.preloaded = ["torch", "torch.distributed", __name__, *preloaded]
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.imported: set[str] = set()

    def ask(self, asked: PlayCall, limit_s: float, grace_s: float = OTHER_RANKS_S) -> Played:
        """Return what all ranks have played within limit_s seconds. grace_s: after a first
        failure. Raises ConfigError if the layer's file cannot be imported."""
        if not self.processes:
            self._start()
        if asked.source not in self.imported:
            self.imported.add(asked.source)
            limit_s += START_S
        for pipe in self.pipes:
            pipe.send(asked)
        answers = self._collect(limit_s, grace_s)
        for answer in answers.values():
            if answer.outcome == NO_LAYER:
                raise ConfigError(f"{asked.source} cannot be imported: {answer.why}")
        played = self._judge(answers, limit_s)
        has_ended = any(answer.why.startswith(ENDED) for answer in answers.values())
        if played.silent or has_ended or (played.outcome == "crashed" and self.size > 1):
            self.close()
        return played

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.processes:
            shutil.rmtree(self.log.parent, ignore_errors=True)
        self.processes, self.pipes = [], []
        self.imported.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.preloaded)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.log = Path(tempfile.mkdtemp(prefix="conform-")) / "printed"
        self.log.touch()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            seat = (rank, self.size, self.ep_size, self.store.port, str(self.log))
            process = context.Process(target=_serve, args=(theirs, *seat))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def _collect(self, limit_s: float, grace_s: float) -> dict[int, Played]:
        """Return the answers of the ranks that gave one, the first one first."""
        answers: dict[int, Played] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answers[waiting[pipe]] = self._receive(pipe)
            if any(answer.outcome != "played" for answer in answers.values()):
                deadline = min(deadline, time.monotonic() + grace_s)
        return answers

    def _receive(self, pipe: Connection) -> Played:
        try:
            return pickle.loads(pipe.recv_bytes())  # only the rank can write into its pipe
        except (EOFError, ConnectionError):
            printed = self.log.read_text(encoding="utf-8", errors="replace")
            last = " / ".join(printed.strip().splitlines()[-LAST_LINES:])
            return Played("crashed", why=f"{ENDED}; it printed: {last}")

    def _judge(self, answers: dict[int, Played], limit_s: float) -> Played:
        silent = tuple(rank for rank in range(self.size) if rank not in answers)
        for rank, answer in answers.items():
            if answer.outcome == "crashed":
                return answer._replace(why=f"rank {rank}: {answer.why}", silent=silent)
        for answer in answers.values():
            if answer.outcome == "not asked":
                return answer._replace(silent=silent)
        if silent:
            ranks = ", ".join(map(str, silent))
            why = f"rank {ranks}: no answer within {limit_s:g} s"
            return Played("timed out", why=why, silent=silent)
        return Played("played", tuple(answers[rank].records[0] for rank in range(self.size)))


def _serve(pipe: Connection, rank: int, size: int, ep_size: int, port: int, log: str) -> None:
    """Answer what comes through the pipe, as one rank, until the pipe closes."""
    with open(log, "a", encoding="utf-8") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    requests: queue.Queue[PlayCall] = queue.Queue()
    threading.Thread(target=_listen, args=(pipe, requests), daemon=True).start()
    torch.set_num_threads(1)
    _set_variables(rank, size, port)
    group = join(ep_size)
    while True:
        played = _play(requests.get(), group)
        pipe.send_bytes(pickle.dumps(played))
        if played.outcome == "crashed" and size > 1:  # so that peers notice
            os._exit(1)


def _listen(pipe: Connection, requests: "queue.Queue[PlayCall]") -> None:
    """Pass requests on. When the pipe closes, end this process, whatever it does."""
    try:
        while True:
            requests.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _play(asked: PlayCall, group: Group) -> Played:
    order = None if asked.order is None else torch.tensor(asked.order)
    try:
        make = make_of(asked.source)
    except BaseException as error:
        return Played(NO_LAYER, why=_in_one_line(error))
    try:
        make = _plain_of(make) if asked.plain else make
        seat = plays.Seat(make, group, getattr(torch, asked.dtype), order, asked.pieces)
        return Played("played", (plays.PLAYS[asked.play](seat, *asked.arguments),))
    except NotAsked as reason:
        return Played("not asked", why=str(reason))
    except BaseException as error:
        return Played("crashed", why=_in_one_line(error))


def _in_one_line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def _plain_of(make: Make) -> Make:
    """Return what makes the layer's formula. Raises NotAsked if it has none."""

    def plain(group: Group, weights: Weights, dtype: torch.dtype) -> Adapter:
        formula = make(group, weights, dtype).plain
        if formula is None:
            raise NotAsked("the adapter has no plain formula")
        return plain_adapter(formula, weights)

    return plain


def join(ep_size: int) -> Group:
    """Join the ranks that torchrun's variables name, over gloo, and return this rank's place."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    grid = torch.arange(size).view(-1, ep_size)
    ep, _ = dist.new_subgroups_by_enumeration(grid.tolist())
    edp, _ = dist.new_subgroups_by_enumeration(grid.T.tolist())
    return Group(rank, size, ep_size, ep, edp)


def _set_variables(rank: int, size: int, port: int) -> None:
    """Set torchrun's variables, as on one machine."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), GROUP_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    os.environ.update(TORCHELASTIC_RUN_ID="conform")
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
