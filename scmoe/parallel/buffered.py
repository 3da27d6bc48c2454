"""Dropless All-to-All that asks the host for nothing: buffers of fixed size, and counts that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Announced, Arriving, ChunkCounts, Pending, Receipt
from scmoe.moe.layout import gather
from scmoe.parallel.dispatcher import AllToAllDispatcher


class BufferedDispatcher(AllToAllDispatcher):
    """The dispatcher for rows in buffers (moe/buffers.py). All ranks send equally many rows, empty ones included."""

    def announce(self, counts_PE: Tensor) -> Announced:
        gathered = counts_PE.new_empty(self.ep_size, *counts_PE.shape)
        work = dist.all_gather(list(gathered), counts_PE.contiguous(), group=self.counts_group, async_op=True)
        by_rank = gathered.view(self.ep_size, len(counts_PE), self.ep_size, -1)
        return OnDevice(work, by_rank[:, :, dist.get_rank(self.group)])

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        assert counts is not None
        transfer = self.start("dispatch", rows_RD)
        from_e = counts.counts_from_e  # of each sender, in front of the empty rows of its buffer
        slots = torch.arange(rows_RD.shape[0] // self.ep_size, device=rows_RD.device)
        labels = torch.searchsorted(from_e.cumsum(1), slots.expand(self.ep_size, -1).contiguous(), right=True)
        order_R = labels.flatten().argsort(stable=True)  # by local expert; empty rows last
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        receipt = Receipt(from_e.sum(0), order_R=order_R, place_R=place_R)
        return Arriving(transfer, lambda rows: gather(rows, order_R, place_R[:, None], complete=True)), receipt


@dataclass(frozen=True)
class OnDevice:
    """The counts of all ranks, on their way; the host reads none of them. to_here: [sender, chunk, e]."""

    work: Any
    to_here: Tensor

    def wait(self) -> Sequence[ChunkCounts]:
        self.work.wait()
        return [ChunkCounts(None, self.to_here[:, p]) for p in range(self.to_here.shape[1])]
