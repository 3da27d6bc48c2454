"""Rank 0 evaluates a model whose experts are on several ranks; the other ranks only compute their experts for it.

Every forward pass needs all ranks of an expert-parallel group. Rank 0 announces each pass, and the others take part in
it with a batch of padding alone. Padding is routed nowhere, so the experts get rank 0's rows and no others: products
are those of one process.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.parallel.mesh import ParallelContext

T = TypeVar("T")
Forward = Callable[..., Any]
"""Computes the model's output for (inputs, mask, and what else it reads): its first entry is the logits."""


def run_on_rank_zero(
    work: Callable[[Forward], T], model: Forward, padding: tuple[Tensor, Tensor], context: ParallelContext
) -> T | None:
    """Return work(forward) on rank 0, and None on the others. Every rank must call it.

    padding: inputs and mask of the smallest batch without any real sample. An error of `work` is raised on rank 0, and
    the other ranks return.
    """
    if context.rank != 0:
        while _another_pass(context, True):
            model(*padding)
        return None
    in_step = True

    def forward(inputs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        nonlocal in_step
        _another_pass(context, True)
        in_step = False
        output = model(inputs, mask, *rest)
        in_step = True
        return output

    try:
        return work(forward)
    finally:
        if in_step:  # else the others are inside a pass and would not receive it
            _another_pass(context, False)


def _another_pass(context: ParallelContext, more: bool) -> bool:
    """Return on every rank what rank 0 says: whether another pass comes."""
    if context.world_size == 1:
        return more
    flag = torch.tensor([more], dtype=torch.uint8)
    dist.broadcast(flag, src=0, group=context.control_group)
    return bool(flag.item())
