"""Sends rows to the experts' ranks and back by All-to-All over an expert-parallel group.

Rank r of the group holds experts r E/EP .. (r+1) E/EP - 1, so rows grouped by expert are grouped by rank. They arrive
grouped by (sender, local expert) and are regrouped by local expert after the wait. The host knows how many rows travel,
or rows are in buffers of fixed size and their numbers stay on the device.
"""

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Announced, Arriving, ChunkCounts, Pending, Receipt, Traffic
from scmoe.moe.layout import gather
from scmoe.moe.operators import Recorder
from scmoe.parallel.wire.all_to_all import Exchange, Transfer, all_to_all


class CeilingError(MemoryError):
    """Dropless routing would send a rank more rows than it may receive."""


class AllToAllDispatcher:
    """The dispatcher of many ranks. Equal numbers of rows per expert need nothing from the host; unequal numbers are
    announced before the rows.

    counts_group: carries the announced numbers, so that they queue behind no rows; None: the group of the rows.
    buffered: rows are in buffers (moe/layout.py): all ranks send equally many, empty ones included.
    ceiling: rows that a rank may receive, over its fair share; None: any number.
    exchange: how rows travel; None: by All-to-All over the group.
    """

    recorder: Recorder | None = None  # notes the times of transfers that run in parallel

    def __init__(
        self,
        group: Any,
        num_experts: int,
        ceiling: float | None = None,
        exchange: Exchange | None = None,
        counts_group: Any = None,
        buffered: bool = False,
    ) -> None:
        self.group, self.num_experts, self.ceiling = group, num_experts, ceiling
        self.counts_group, self.buffered = counts_group or group, buffered
        self.exchange = exchange or all_to_all(group)
        self.ep_size = dist.get_world_size(group)

    def recorded_by(self, recorder: Recorder) -> "AllToAllDispatcher":
        """The same dispatcher with a recorder."""
        recorded = copy(self)
        recorded.recorder = recorder
        return recorded

    def announce(self, counts_PE: Tensor) -> Announced:
        """Every rank receives the counts of all ranks, so that all of them notice if one would receive too many."""
        gathered = counts_PE.new_empty(self.ep_size, *counts_PE.shape)
        work = dist.all_gather(list(gathered), counts_PE.contiguous(), group=self.counts_group, async_op=True)
        by_rank = gathered.view(self.ep_size, len(counts_PE), self.ep_size, -1)  # [sender, chunk, receiver, e]
        rank = dist.get_rank(self.group)
        if self.buffered:
            return OnDevice(work, by_rank[:, :, rank])
        return ReadByHost(work, by_rank, rank, self.ceiling)

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        if counts is None:
            regroup = partial(swap, outer=self.ep_size, inner=self.num_experts // self.ep_size)
            return Arriving(self.start("dispatch", rows_RD), regroup), Receipt(None)
        transfer = self.start("dispatch", rows_RD, counts.traffic)
        # a stable sort by local expert groups the rows of all senders
        order_R = experts_of_rows(counts, rows_RD.shape[0]).argsort(stable=True)
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        receipt = Receipt(counts.counts_from_e.sum(0), counts.traffic, order_R, place_R)
        return Arriving(transfer, lambda rows: gather(rows, order_R, place_R[:, None], complete=True)), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        if receipt.order_R is None:
            return self.start("combine", swap(rows_RD, self.num_experts // self.ep_size, self.ep_size))
        assert receipt.place_R is not None
        rows_RD = gather(rows_RD, receipt.place_R, receipt.order_R[:, None], complete=True)
        return self.start("combine", rows_RD, receipt.traffic and receipt.traffic.back())

    def start(self, operator: str, rows_RD: Tensor, traffic: Traffic | None = None) -> Transfer:
        return Transfer(self.exchange, traffic, operator, self.recorder).start(rows_RD)


@dataclass(frozen=True)
class ReadByHost:
    """The counts of all ranks, on their way. by_rank: [sender, chunk, receiver, e]."""

    work: Any
    by_rank: Tensor
    rank: int
    ceiling: float | None

    def wait(self) -> list[ChunkCounts]:
        """The one place where the host waits for the device in a step without slots: once for each layer."""
        self.work.wait()
        rows = self.by_rank.sum(-1).cpu()  # [sender, chunk, receiver]
        if self.ceiling is not None:
            check_ceiling(rows.sum((0, 1)).tolist(), self.ceiling)  # of all chunks: they are in memory together
        sent, received = rows[self.rank].tolist(), rows[:, :, self.rank].T.tolist()
        to_here = self.by_rank[:, :, self.rank]  # [sender, chunk, e]
        return [
            ChunkCounts(sum(sent[p]), to_here[:, p], Traffic(sent[p], received[p], rows[:, p]))
            for p in range(len(sent))
        ]


def experts_of_rows(counts: ChunkCounts, num_sent: int) -> Tensor:
    """[R]: the local expert of each row that arrives, in the order (sender, expert). In a buffer, empty rows follow
    those of its sender; they get the number of experts, so that they sort last."""
    from_e = counts.counts_from_e
    if counts.traffic is not None:
        experts = torch.arange(from_e.numel(), device=from_e.device) % from_e.shape[1]
        return experts.repeat_interleave(from_e.flatten(), output_size=sum(counts.traffic.received))
    places = torch.arange(num_sent // len(from_e), device=from_e.device)
    return torch.searchsorted(from_e.cumsum(1), places.expand(len(from_e), -1).contiguous(), right=True).flatten()


def swap(rows_RD: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in the order (outer, inner) to (inner, outer): between senders and local experts, of equal numbers."""
    return rows_RD.view(outer, inner, -1, rows_RD.shape[1]).transpose(0, 1).reshape_as(rows_RD)


def check_ceiling(received: list[int], ceiling: float) -> None:
    """Raises CeilingError before memory for the rows is allocated (fault 31). received: rows for each rank."""
    fair = sum(received) / len(received)
    worst = max(range(len(received)), key=lambda rank: received[rank])
    if received[worst] > ceiling * fair:
        raise CeilingError(
            f"rank {worst} of the expert-parallel group would receive {received[worst]} rows, allowed: "
            f"{ceiling:g} x the fair share of {fair:g} (moe.dropless_ceiling); raise it, or moe.load_balance_coef, or "
            "drop tokens with moe.capacity_factor"
        )


@dataclass(frozen=True)
class OnDevice:
    """The counts of all ranks, on their way; the host reads none of them. to_here: [sender, chunk, e]."""

    work: Any
    to_here: Tensor

    def wait(self) -> list[ChunkCounts]:
        self.work.wait()
        return [ChunkCounts(None, counts_from_e) for counts_from_e in self.to_here.unbind(1)]
