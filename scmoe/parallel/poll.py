"""Yes-or-no questions that all ranks must answer alike, without ever waiting for the answer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Poll:
    """Flags of all ranks, added up: the sum is started at one batch and read at the next, so it has long been there.

    group: a gloo group of all ranks that carries nothing else.
    """

    def __init__(self, group: Any, num_flags: int) -> None:
        self.group, self.num_flags = group, num_flags
        self.in_flight: tuple[dist.Work, Tensor] | None = None

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag whether some rank had raised it at the call before. Every rank must call it as often."""
        answers = self.close()
        sums = torch.tensor(flags, dtype=torch.int64)
        self.in_flight = (dist.all_reduce(sums, group=self.group, async_op=True), sums)
        return answers

    def smallest(self, count: float) -> float:
        """The smallest count of all ranks, waited for: how often all of them can ask. Every rank must call it."""
        least = torch.tensor(count, dtype=torch.float64)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return least.item()

    def close(self) -> list[bool]:
        """Waits for what is in flight, if anything."""
        if self.in_flight is None:
            return [False] * self.num_flags
        work, sums = self.in_flight
        work.wait()
        self.in_flight = None
        return [bool(n) for n in sums]
