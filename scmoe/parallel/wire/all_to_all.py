"""All-to-All as two autograd nodes, start and wait, so that backward overlaps by the mirror (design idea 4).

    forward    start: launch the transfer           ...work...    wait: the rows are there
    backward   start: the gradient is there         ...work...    wait: launch the gradient's transfer

Of the nodes that are ready, the autograd engine runs the one created last. After `start; work; wait` in forward, it
launches the gradient's transfer before the work's backward and waits for it afterwards. A single node would launch and
wait at the same place.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from scmoe.moe.dispatcher import Traffic
from scmoe.moe.operators import Recorder


class Work(Protocol):
    """An exchange in flight."""

    def wait(self) -> Any:
        """Returns when the caller may use the rows in its next computation."""


Exchange = Callable[[Tensor, Traffic | None], tuple[Tensor, Work]]
"""exchange(rows, traffic) starts an exchange and returns (target buffer, work). traffic: numbers of rows to and from
each rank; None: equal numbers. `rows` are grouped by receiver, the rows in the target buffer by sender."""


def all_to_all(group: Any) -> Exchange:
    """The exchange of a process group: point to point with gloo, one collective with other backends.

    On CUDA it runs on the group's own stream, which starts when the rows are there; `wait` makes the current stream
    wait, not the host. A caller that keeps both buffers until then need not record them on that stream.
    """
    gloo = dist.get_backend(group) == "gloo"

    def exchange(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        sent, received = ([], []) if traffic is None else (list(traffic.sent), list(traffic.received))
        target = buffer_for(rows, traffic)
        if gloo:
            return target, point_to_point(target, rows, received, sent, group)
        return target, dist.all_to_all_single(target, rows, received, sent, group=group, async_op=True)

    return exchange


def buffer_for(rows: Tensor, traffic: Traffic | None) -> Tensor:
    """An empty tensor for the rows that an exchange of `rows` brings here."""
    return rows.new_empty((len(rows) if traffic is None else sum(traffic.received), *rows.shape[1:]))


def point_to_point(target: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any) -> Work:
    """Posts all receives first, then the sends.

    gloo sends rows after the peer has announced that it expects them. gloo's own All-to-All announces this after it has
    started to send: on the later rank the announcement queues behind its own rows, and the two directions of a link
    take turns. Posting takes some milliseconds while other rows arrive, so a thread does it while the caller computes
    (docs/decisions/0019-point-to-point.md has the measurements).
    """
    return Posted(_poster().submit(post, target, rows, received, sent, group))


@functools.cache
def _poster() -> ThreadPoolExecutor:
    """One thread for all layers, directions and groups, so that the order of posting stays equal on all ranks."""
    return ThreadPoolExecutor(1, "all-to-all")


os.register_at_fork(after_in_child=_poster.cache_clear)


@torch.inference_mode()
def post(target: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any) -> list[Any]:
    """Posts the receives and the sends, in this thread, and returns them."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    targets = target.split(received) if received else target.chunk(size)
    sources = rows.split(sent) if sent else rows.chunk(size)
    before, after = ([(rank + step * i) % size for i in range(1, size)] for step in (-1, 1))
    works = [dist.irecv(targets[peer], group=group, group_src=peer) for peer in before if targets[peer].numel()]
    works += [dist.isend(sources[peer], group=group, group_dst=peer) for peer in after if sources[peer].numel()]
    targets[rank].copy_(sources[rank])
    return works


class Posted:
    """Sends and receives as one work. Two threads may wait for it: a recorder's and the one that needs the rows."""

    def __init__(self, posted: Future[list[Any]]) -> None:
        self.posted, self.lock = posted, threading.Lock()

    def wait(self) -> None:
        with self.lock:
            works = self.posted.result()
            while works:
                works[0].wait()  # where it raises, it does so for the second thread too
                works.pop(0)


class Link:
    """Keeps this rank's latest exchange of rows, so that gradients can wait until it is finished (update/pacing.py)."""

    def __init__(self) -> None:
        self.latest: Work | None = None

    def wait(self) -> None:
        """Return when no rows are in flight."""
        while (work := self.latest) is not None:
            work.wait()
            if work is self.latest:
                return


@dataclass(frozen=True)
class Carried:
    """An exchange that stores each of its transfers in `link.latest`."""

    exchange: Exchange
    link: Link

    def __call__(self, rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        target, self.link.latest = self.exchange(rows, traffic)
        return target, self.link.latest


@dataclass(eq=False)
class Transfer:
    """One exchange of rows, and later the way back of its gradient. `start` launches it, `wait` returns the rows.

    traffic: rows to and from each rank of the group; None: equal numbers for all ranks.
    operator, recorder: the recorder notes the transfer under this name.
    A buffer in flight is kept here until its wait, so it cannot be freed or used again before.
    """

    exchange: Exchange
    traffic: Traffic | None = None
    operator: str = "dispatch"
    recorder: Recorder | None = None
    out: Tensor | None = field(default=None, init=False)
    source: Tensor | None = field(default=None, init=False)
    work: Work | None = field(default=None, init=False)

    @torch.compiler.disable
    def start(self, rows: Tensor) -> Self:
        self.out = _Start.apply(rows, self)
        return self

    @torch.compiler.disable
    def wait(self) -> Tensor:
        out, self.out = self.out, None
        assert out is not None, "a transfer is started once and awaited once"
        return _Wait.apply(out, self)

    def launch(self, rows: Tensor, backward: bool) -> Tensor:
        traffic = self.traffic.back() if self.traffic is not None and backward else self.traffic
        self.source = rows.contiguous()
        with torch.profiler.record_function(f"scmoe/{self.operator}"):
            target, self.work = self.exchange(self.source, traffic)
        if self.recorder is not None:
            self.recorder.watch(self.operator, "backward" if backward else "forward", self.work)
        return target

    def finish(self) -> None:
        assert self.work is not None
        with torch.profiler.record_function(f"scmoe/{self.operator} wait"):
            self.work.wait()
        self.work = self.source = None


class _Start(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows, backward=False)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        transfer = ctx.transfer
        transfer.finish()
        grad, transfer.grad = transfer.grad, None
        return grad, None


class _Wait(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        transfer = ctx.transfer
        transfer.grad = transfer.launch(grad, backward=True)
        return grad, None  # a placeholder: the engine checks the shape; start's backward returns the real gradient
