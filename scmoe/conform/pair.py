"""`pair:FILE.py:NAME`: a dispatch and a combine without experts, as a layer that can be asked.

    def NAME(group): return dispatch, combine

    dispatch(x_TD, ids_TK) -> rows_RD, state        copies on the ranks of their experts
    combine(rows_RD, weights_TK, state) -> y_TD     their weighted sum, on the ranks of their tokens

Experts are the identity, so the right answer is known: y = (sum over k of weight_k) x. The router
is conform's own; its gradient is averaged here. Expert i is on rank i // (E / ranks).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.conform.adapter import Adapter, Group, Read, gradient
from scmoe.conform.plain import TOP_K, Plain, Weights

Dispatch = Callable[[Tensor, Tensor], tuple[Tensor, Any]]
Combine = Callable[[Tensor, Tensor, Any], Tensor]
PLAIN = Plain(activation="identity", normalise=False, projection=False)


def make(
    pair: Callable[[Group], tuple[Dispatch, Combine]],
    group: Group,
    weights: Weights,
    dtype: torch.dtype,
) -> Adapter:
    """Return the pair behind a router, with experts that are the identity."""
    dispatch, combine = pair(group)
    router = weights.router.clone().requires_grad_()

    def forward(x_TD: Tensor) -> Tensor:
        best = (x_TD @ router.T).softmax(-1).topk(TOP_K)
        rows_RD, state = dispatch(x_TD, best.indices)
        return combine(rows_RD, best.values, state)

    def backward(loss: Tensor) -> None:
        loss.backward()
        router.grad = gradient(router)  # zero if the pair let none through
        dist.all_reduce(router.grad)
        router.grad /= group.size

    def dense(read: Read) -> dict[str, Tensor]:
        return {"router": read(router)}

    return Adapter(
        forward=forward, backward=backward, experts=lambda read: {}, dense=dense, plain=PLAIN
    )
