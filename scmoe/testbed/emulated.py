"""Emulated compute: operators that sleep for a calibrated time, forward and backward, so that more ranks than cores
can run in parallel with real transfers. Shapes, rows and gradients are those of the real operators.

Backward takes twice the time of forward, as for products: one for the input's gradient, one for the weight's.
"""

import time

from torch import Tensor, nn
from torch.autograd import Function


class _Sleep(Function):
    @staticmethod
    def forward(ctx, x: Tensor, seconds: float):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        time.sleep(2 * ctx.seconds)
        return grad, None


class EmulatedOperator(nn.Module):
    """Replaces a sub-layer or a shared expert: the identity, after `ms` milliseconds."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def forward(self, x_BSD: Tensor) -> Tensor:
        return _Sleep.apply(x_BSD, self.ms / 1e3)


class EmulatedExperts(nn.Module):
    """Replaces moe.experts.Experts: the identity, after us_per_row microseconds for each row."""

    def __init__(self, us_per_row: float) -> None:
        super().__init__()
        self.us_per_row = us_per_row

    def forward(self, rows_RD: Tensor, counts_e: Tensor | None) -> Tensor:
        return _Sleep.apply(rows_RD, self.us_per_row * rows_RD.shape[0] / 1e6)
