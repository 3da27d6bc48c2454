"""Dropless All-to-All without host synchronisation: buffers of fixed size, and counts that stay on the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe.moe.dispatcher import Announced, ChunkCounts
from scmoe.parallel.wire.all_to_all_dispatcher import AllToAllDispatcher


class BufferedDispatcher(AllToAllDispatcher):
    """The dispatcher for rows in buffers (moe/buffers.py). All ranks send equally many rows, empty ones included."""

    def announced(self, work: Any, by_rank: Tensor, rank: int) -> Announced:
        return OnDevice(work, by_rank[:, :, rank])

    def experts_of_rows(self, counts: ChunkCounts, num_sent: int) -> Tensor:
        """[R]: the local expert of each row that arrives. Empty rows get the number of experts: they sort last."""
        ends_e = counts.counts_from_e.cumsum(1)  # of each sender's rows; the empty ones come after them
        places = torch.arange(num_sent // self.ep_size, device=ends_e.device)
        return torch.searchsorted(ends_e, places.expand(self.ep_size, -1).contiguous(), right=True).flatten()


@dataclass(frozen=True)
class OnDevice:
    """The counts of all ranks, on their way; the host reads none of them. to_here: [sender, chunk, e]."""

    work: Any
    to_here: Tensor

    def wait(self) -> list[ChunkCounts]:
        self.work.wait()
        return [ChunkCounts(None, counts_from_e) for counts_from_e in self.to_here.unbind(1)]
