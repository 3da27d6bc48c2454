"""How many rows come from each rank, as the ranks have announced it before the rows.

The host reads the numbers (ReadByHost), or they stay on the device, where rows are in buffers of
fixed size (OnDevice).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe.moe.dispatcher import ChunkCounts, Traffic


class CeilingError(MemoryError):
    """Dropless routing would send a rank more rows than it may receive."""


@dataclass(frozen=True)
class ReadByHost:
    """The counts of all ranks, on their way. by_rank: [sender, chunk, receiver, e]."""

    work: Any
    by_rank: Tensor
    rank: int
    ceiling: float | None

    def wait(self) -> list[ChunkCounts]:
        """Wait for the counts on the host, once for each layer.

        Without slots the host can wait for the device in two more places: `arrange_filled` (padded)
        and `mlps_in_turn`.
        """
        self.work.wait()
        rows = self.by_rank.sum(-1).cpu()  # [sender, chunk, receiver]
        if self.ceiling is not None:
            # of all chunks: they are in memory together
            check_ceiling(rows.sum((0, 1)).tolist(), self.ceiling)
        sent = rows[self.rank].tolist()
        received = rows[:, :, self.rank].T.tolist()
        to_here = self.by_rank[:, :, self.rank]  # [sender, chunk, e]
        return [
            ChunkCounts(sum(sent[p]), to_here[:, p], Traffic(sent[p], received[p]))
            for p in range(len(sent))
        ]


def experts_of_rows(counts: ChunkCounts, num_sent: int) -> Tensor:
    """Return the local expert [R] of each row that arrives, in the order (sender, expert).

    In a buffer, empty rows follow those of its sender; they get the number of experts, so that they
    sort last.
    """
    from_e = counts.counts_from_e
    if counts.traffic is not None:
        experts = torch.arange(from_e.numel(), device=from_e.device) % from_e.shape[1]
        return experts.repeat_interleave(from_e.flatten(), output_size=sum(counts.traffic.received))
    places = torch.arange(num_sent // len(from_e), device=from_e.device)
    return torch.searchsorted(
        from_e.cumsum(1), places.expand(len(from_e), -1).contiguous(), right=True
    ).flatten()


def check_ceiling(received: list[int], ceiling: float) -> None:
    """Raise CeilingError before memory for the rows is allocated (fault 31).

    received: rows for each rank.
    """
    fair = sum(received) / len(received)
    worst = max(range(len(received)), key=lambda rank: received[rank])
    if received[worst] > ceiling * fair:
        raise CeilingError(
            f"rank {worst} of the expert-parallel group would receive {received[worst]} rows,"
            f" allowed: {ceiling:g} x the fair share of {fair:g} (moe.dropless_ceiling); raise it,"
            " or moe.load_balance_coef, or drop tokens with moe.capacity_factor"
        )


@dataclass(frozen=True)
class OnDevice:
    """The counts of all ranks, on their way; the host reads none of them.

    to_here: [sender, chunk, e].
    """

    work: Any
    to_here: Tensor

    def wait(self) -> list[ChunkCounts]:
        self.work.wait()
        return [ChunkCounts(None, counts_from_e) for counts_from_e in self.to_here.unbind(1)]
