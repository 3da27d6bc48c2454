"""Sends rows to the experts' ranks and back by All-to-All over an expert-parallel group.

A transfer is two autograd nodes, start and wait, so that backward overlaps by the mirror (design
idea 4):

    forward    start: launch the transfer        ...work...    wait: the rows are there
    backward   start: the gradient is there      ...work...    wait: launch the gradient's transfer

Of the nodes that are ready, the autograd engine runs the one created last. After `start; work;
wait` in forward, it launches the gradient's transfer before the work's backward and waits for it
afterwards. A single node would launch and wait at the same place.

The gradients of rows that other ranks have sent arrive at the rank that holds their expert, so its
backward sums the expert's gradients over the group.

Rank r of the group holds experts r E/EP .. (r+1) E/EP - 1, so rows grouped by expert are grouped by
rank. They arrive grouped by (sender, local expert) and are regrouped by local expert after the
wait. The host knows how many rows travel, or rows are in buffers of fixed size and their numbers
stay on the device.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from scmoe.moe.dispatcher import Announced, Arriving, ChunkCounts, Pending, Receipt, Traffic
from scmoe.moe.gather import gather
from scmoe.moe.operators import AnyRecorder
from scmoe.parallel.wire.announced import OnDevice, ReadByHost, experts_of_rows
from scmoe.parallel.wire.wire import EvenRows


class Work(Protocol):
    """An exchange in flight."""

    def wait(self) -> Any:
        """Return when the caller may use the rows in its next computation."""


Exchange = Callable[[Tensor, Traffic | None], tuple[Tensor, Work]]
"""exchange(rows, traffic) starts an exchange and returns (target buffer, work). traffic: numbers of
rows to and from each rank; None: equal numbers. `rows` are grouped by receiver, the rows in the
target buffer by sender."""


def all_to_all(group: Any) -> Exchange:
    """Return the exchange of a process group.

    It is point to point with gloo, one collective with other backends. On CUDA it runs on the
    group's own stream, which starts when the rows are there; `wait` makes the current stream wait,
    not the host. A caller that keeps both buffers until then need not record them on that stream.
    The exchange raises ValueError for rows on a GPU with gloo, whose threads know no stream.
    """
    gloo = dist.get_backend(group) == "gloo"

    def exchange(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        if gloo and rows.is_cuda:
            raise ValueError("the group's backend is gloo, allowed for rows on a GPU: nccl")
        sent = [] if traffic is None else list(traffic.sent)
        received = [] if traffic is None else list(traffic.received)
        target = buffer_for(rows, traffic)
        if gloo:
            return target, point_to_point(target, rows, received, sent, group)
        return target, collective(target, rows, received, sent, group)

    return exchange


def buffer_for(rows: Tensor, traffic: Traffic | None) -> Tensor:
    """Return an empty tensor for the rows that an exchange of `rows` brings here."""
    num_rows = len(rows) if traffic is None else sum(traffic.received)
    return rows.new_empty((num_rows, *rows.shape[1:]))


def point_to_point(
    target: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any
) -> Work:
    """Post all receives first, then the sends.

    gloo sends rows after the peer has announced that it expects them. gloo's own All-to-All
    announces this after it has started to send: on the later rank the announcement queues behind
    its own rows, and the two directions of a link take turns. Posting takes some milliseconds while
    other rows arrive, so a thread does it while the caller computes
    (docs/decisions/0019-point-to-point.md has the measurements).
    """
    return Posted(thread("all-to-all").submit(post, target, rows, received, sent, group))


@functools.cache
def thread(name: str) -> ThreadPoolExecutor:
    """Return the thread of this name.

    It is one for all layers, directions and groups, so that the order of posting stays equal on all
    ranks.
    """
    return ThreadPoolExecutor(1, name)


os.register_at_fork(after_in_child=thread.cache_clear)


@torch.inference_mode()
def post(
    target: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any
) -> list[Any]:
    """Post the receives and the sends, in this thread, and return them."""
    size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    targets = target.split(received) if received else target.chunk(size)
    sources = rows.split(sent) if sent else rows.chunk(size)
    before = [(rank - i) % size for i in range(1, size)]
    after = [(rank + i) % size for i in range(1, size)]

    works = [
        dist.irecv(targets[peer], group=group, group_src=peer)
        for peer in before
        if targets[peer].numel()
    ]
    works += [
        dist.isend(sources[peer], group=group, group_dst=peer)
        for peer in after
        if sources[peer].numel()
    ]
    targets[rank].copy_(sources[rank])
    return works


def collective(
    target: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any
) -> Work:
    """Start one collective on the group's own stream."""
    work = dist.all_to_all_single(target, rows, received, sent, group=group, async_op=True)
    assert work is not None, "this rank is in the group"
    return work


class Posted:
    """Sends and receives as one work.

    Two threads may wait for it: a recorder's and the one that needs the rows.
    """

    def __init__(self, posted: Future[list[Any]]) -> None:
        self.posted = posted
        self.lock = threading.Lock()

    @torch.no_grad()
    def wait(self) -> None:
        with self.lock:
            works = self.posted.result()
            while works:
                works[0].wait()  # where it raises, it does so for the second thread too
                works.pop(0)


@dataclass(eq=False)
class Transfer:
    """One exchange of rows, and later the way back of its gradient.

    `start` launches it, `wait` returns the rows.

    traffic: rows to and from each rank of the group; None: equal numbers for all ranks.
    operator, recorder: the recorder notes the transfer under this name.
    A buffer in flight is kept here until its wait, so it cannot be freed or used again before.
    """

    exchange: Exchange
    traffic: Traffic | None = None
    operator: str = "dispatch"
    recorder: AnyRecorder | None = None
    out: Tensor | None = field(default=None, init=False)
    source: Tensor | None = field(default=None, init=False)
    work: Work | None = field(default=None, init=False)
    grad: Tensor | None = field(default=None, init=False)  # from the wait's backward to the start's

    @torch.compiler.disable
    def start(self, rows: Tensor) -> Self:
        self.out = _Start.apply(rows, self)
        return self

    @torch.compiler.disable
    def wait(self) -> Tensor:
        out = self.out
        assert out is not None, "a transfer is started once and awaited once"
        self.out = None
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
    @once_differentiable  # the rows of the gradient's transfer have no history
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
    @once_differentiable
    def backward(ctx, grad: Tensor):
        transfer = ctx.transfer
        transfer.grad = transfer.launch(grad, backward=True)
        # a placeholder: the engine checks the shape; start's backward returns the real gradient
        return grad, None


class AllToAllDispatcher:
    """The dispatcher of many ranks.

    Equal numbers of rows per expert need nothing from the host; unequal numbers are announced
    before the rows.

    counts_group: carries the announced numbers, so that they queue behind no rows; None: the group
    of the rows. buffered: rows are in buffers (moe/layout.py): all ranks send equally many, empty
    ones included. ceiling: rows that a rank may receive in training, over its fair share; None: any
    number.
    exchange: how rows travel; None: by All-to-All over the group. even: checks numbers of rows that
    are not announced; None: nothing is checked.

    A deep copy of a module shares this with the module. A pickle cannot hold process groups: what
    is read from one raises at its first exchange.
    """

    recorder: AnyRecorder | None = None  # notes the times of transfers that run in parallel

    def __init__(
        self,
        group: Any,
        num_experts: int,
        ceiling: float | None = None,
        exchange: Exchange | None = None,
        counts_group: Any = None,
        buffered: bool = False,
        even: EvenRows | None = None,
    ) -> None:
        self.group = group
        self.num_experts = num_experts
        self.ceiling = ceiling
        self.counts_group = counts_group or group
        self.buffered = buffered
        self.even = even
        self.exchange = exchange or all_to_all(group)
        self.ep_size = dist.get_world_size(group)

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        return WithoutGroup, (self.num_experts, self.ep_size)

    def recorded_by(self, recorder: AnyRecorder) -> "AllToAllDispatcher":
        """Return the same dispatcher with a recorder."""
        recorded = copy(self)
        recorded.recorder = recorder
        return recorded

    def announce(self, counts_PE: Tensor) -> Announced:
        """Send the counts of all ranks to every rank.

        So all of them notice if one would receive too many.
        """
        gathered = counts_PE.new_empty(self.ep_size * len(counts_PE), counts_PE.shape[1])
        # into one tensor: into a list, NCCL would copy with a kernel for each rank.
        # older torch has only the second of the two names
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(gathered, counts_PE.contiguous(), group=self.counts_group, async_op=True)
        # [sender, chunk, receiver, e]
        by_rank = gathered.view(self.ep_size, len(counts_PE), self.ep_size, -1)
        rank = dist.get_rank(self.group)
        if self.buffered:
            return OnDevice(work, by_rank[:, :, rank])
        # Few tokens, as when a text is generated, may all go to one rank.
        ceiling = self.ceiling if torch.is_grad_enabled() else None
        return ReadByHost(work, by_rank, rank, ceiling)

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        if self.even is not None and (counts is None or counts.traffic is None):
            self.even.check(len(rows_RD))
        if counts is None:
            regroup = partial(swap, outer=self.ep_size, inner=self.num_experts // self.ep_size)
            return Arriving(self.start("dispatch", rows_RD), regroup), Receipt(None)
        transfer = self.start("dispatch", rows_RD, counts.traffic)
        # a stable sort by local expert groups the rows of all senders
        order_R = experts_of_rows(counts, rows_RD.shape[0]).argsort(stable=True)
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        receipt = Receipt(counts.counts_from_e.sum(0), counts.traffic, order_R, place_R)
        return (
            Arriving(transfer, lambda rows: gather(rows, order_R, place_R[:, None], complete=True)),
            receipt,
        )

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        if receipt.order_R is None:
            return self.start(
                "combine", swap(rows_RD, self.num_experts // self.ep_size, self.ep_size)
            )
        assert receipt.place_R is not None
        rows_RD = gather(rows_RD, receipt.place_R, receipt.order_R[:, None], complete=True)
        return self.start("combine", rows_RD, receipt.traffic and receipt.traffic.back())

    def start(self, operator: str, rows_RD: Tensor, traffic: Traffic | None = None) -> Transfer:
        return Transfer(self.exchange, traffic, operator, self.recorder).start(rows_RD)


@dataclass(frozen=True)
class WithoutGroup:
    """What a pickle holds of an AllToAllDispatcher."""

    num_experts: int
    ep_size: int

    def refuse(self, *_: Any) -> Any:
        """Raise RuntimeError: there are no ranks to send rows to."""
        raise RuntimeError(
            "this module was read from a pickle, which holds no process group: it has the experts"
            f" of one of {self.ep_size} ranks and cannot reach the others. Build the module again"
            " and load a checkpoint into it"
        )

    announce = dispatch = combine = refuse


def swap(rows_RD: Tensor, outer: int, inner: int) -> Tensor:
    """Return rows in the order (inner, outer) of rows in the order (outer, inner).

    One of these is the sender, the other the local expert; all have equal numbers of rows.
    """
    return rows_RD.view(outer, inner, -1, rows_RD.shape[1]).transpose(0, 1).reshape_as(rows_RD)
