"""What is sharded: the parameters of `Experts` modules, and the global gradient norm over shards and replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from scmoe.moe.experts import Experts
from scmoe.parallel.mesh import ParallelContext


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (from `module`) and tensors of all expert shards. The module's class marks them: a class survives deepcopy,
    to_empty and compile, an attribute on a tensor does not."""
    for prefix, child in module.named_modules():
        if isinstance(child, Experts):
            for name, parameter in child.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, parameter


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    shards: set[nn.Parameter],
    max_norm: float | None,
    context: ParallelContext,
    zero: Tensor | float = 0.0,
) -> Tensor:
    """Scales all gradients to the global norm max_norm if it is larger (None: never); returns the norm before.

    norm^2 = |dense|^2 + sum over ranks |shards|^2 / EDP. One sum over all ranks, so the norm is the same to the bit
    on every rank: were it only close, dense replicas would drift apart.
    zero: of the guard; where it is NaN on one rank, the norm is NaN on all.
    """
    parameters = list(parameters)
    dense = [p.grad for p in parameters if p.grad is not None and p not in shards]
    sharded = [p.grad for p in parameters if p.grad is not None and p in shards]
    square = torch.nn.utils.get_total_norm(sharded).square() / context.edp_size + zero
    norm = (context.sum_over_ranks(square) + torch.nn.utils.get_total_norm(dense).square()).sqrt()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
