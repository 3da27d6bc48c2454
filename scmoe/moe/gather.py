"""A gather of rows whose gradient is a gather too.

A scatter-add would be slower and, on CUDA, not deterministic.
"""

import torch
from torch import Tensor
from torch.autograd import Function


def gather(x_TD: Tensor, tokens_R: Tensor, rows_TK: Tensor, complete: bool) -> Tensor:
    """Return x[tokens_R].

    rows_TK must be the inverse of tokens_R, so that the gradient is a gather too. complete: every
    entry of rows_TK is a row.
    """
    if not torch.is_grad_enabled():
        return x_TD.index_select(0, tokens_R)
    return _Gather.apply(x_TD, tokens_R, rows_TK, complete)


def pick(rows_RD: Tensor, index: Tensor, complete: bool) -> Tensor:
    """Return rows[index], with zeros where index is R. complete: no index is R."""
    if complete:
        return rows_RD.index_select(0, index)
    num_rows = rows_RD.shape[0]
    if num_rows == 0:
        return rows_RD.new_zeros(index.shape[0], rows_RD.shape[1])
    picked = rows_RD.index_select(0, index.clamp(max=num_rows - 1))
    return picked.masked_fill_((index == num_rows)[:, None], 0)


class _Gather(Function):
    @staticmethod
    def forward(ctx, x_TD, tokens_R, rows_TK, complete):
        ctx.save_for_backward(rows_TK)
        ctx.complete = complete
        return x_TD.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (rows_TK,) = ctx.saved_tensors
        grad_TD = pick(grad_RD, rows_TK[:, 0], ctx.complete)
        for k in range(1, rows_TK.shape[1]):
            grad_TD += pick(grad_RD, rows_TK[:, k], ctx.complete)
        return grad_TD, None, None, None
