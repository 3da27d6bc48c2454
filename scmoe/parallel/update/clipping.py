"""One global gradient norm of weights that every rank holds, of experts, and of weights that are split over ranks."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scmoe.parallel.dense_shards import copies, local
from scmoe.parallel.mesh import ParallelContext


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    shards: set[nn.Parameter],
    max_norm: float | None,
    context: ParallelContext,
    zero: Tensor | float = 0.0,
) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm (None: do not); return the norm before that.

    norm² = |replicated|² + (sum over ranks of |parts|² / number of ranks with the same part). One sum over all ranks
    makes the norm bit-identical on all ranks; if it were only close, replicas would drift apart.
    zero: `Guard.loss_as_zero()`; a NaN on one rank makes the norm NaN on all ranks.
    """
    parameters = list(parameters)
    of_parts, of_replicated = squares(parameters, shards, context, parameters[0].device)
    norm = (context.sum_over_ranks(of_parts + zero) + of_replicated).sqrt()
    if max_norm is not None:
        split = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        torch.nn.utils.clip_grads_with_norm_((p for p in parameters if not isinstance(p.grad, DTensor)), max_norm, norm)
        for gradient in split:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def squares(
    parameters: Iterable[nn.Parameter], shards: set[nn.Parameter], context: ParallelContext, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return two squared norms of gradients: of the parts that this rank holds, to be summed over all ranks, and of
    what every rank holds whole. A part that several ranks hold counts once in the sum. shards: the experts."""
    replicated, parts = list[Tensor](), defaultdict[int, list[Tensor]](list)  # parts by the ranks that hold the same
    for p in parameters:
        if isinstance(p.grad, DTensor):
            parts[copies(p.grad)].append(local(p.grad))
        elif p.grad is not None and p in shards:
            parts[context.edp_size].append(p.grad)
        elif p.grad is not None:
            replicated.append(p.grad)
    square = torch.zeros((), device=device)
    for holders, gradients in parts.items():
        square = square + total_norm(gradients, device).square() / holders
    return square, total_norm(replicated, device).square()


def total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the joint norm, on `device`: of an empty list torch returns a norm on the CPU, which NCCL refuses."""
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
