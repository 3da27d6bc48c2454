"""As many batches on every rank, or nobody begins (fault 16).

A rank that runs out of batches leaves the others waiting in a collective until the timeout, and its own error, if it
comes to one, says nothing of batches. Their numbers are known beforehand. Left out: loaders without a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from scmoe.parallel.mesh import ParallelContext


def check_even(what: str, batches: Sequence[float], context: ParallelContext) -> None:
    """ValueError, alike on every rank, where ranks have different numbers of batches. Every rank must call it.

    batches: of each loader; inf where its length is not known.
    """
    if context.world_size == 1:
        return
    everyones: list[Any] = [None] * context.world_size
    dist.all_gather_object(everyones, [float(n) for n in batches], group=context.control_group)
    if any(counts != everyones[0] for counts in everyones):
        counts = "; ".join(f"rank {rank}: {' + '.join(f'{n:g}' for n in ns)}" for rank, ns in enumerate(everyones))
        raise ValueError(
            f"ranks have different numbers of {what} batches ({counts}), allowed: as many on each; pad the last ones, "
            f"or set limit_{what}_batches"
        )
