"""Stand-ins for operators and for the network. Shapes, rows and gradients are those of the real ones.

Emulated operators sleep for a calibrated time, forward and backward, so that more ranks than cores can run in parallel
with real transfers. Backward takes twice as long, as for products: the input's gradient, and the weight's.
Exchanges without a network are free, or go over a GPU's bus to the host and back. Each is an Exchange for
parallel/dispatcher.py, so all code around it is the code that runs between ranks.
"""

import time

import torch
from torch import Tensor, nn
from torch.autograd import Function

from scmoe.moe.dispatcher import Ready
from scmoe.parallel.all_to_all import Exchange, Work


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


def free(rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Work]:
    """Free communication: every rank keeps its rows, as if they came from its peers. Equal numbers only."""
    assert not sent and not received
    return rows, Ready(rows)


def over_the_bus(device: torch.device) -> Exchange:
    """Copies rows to pinned host memory and back on a separate stream, as an All-to-All between GPUs on PCIe without
    peer access does; one GPU is enough. The copies run in parallel with the computation of the current stream."""
    stream = torch.cuda.Stream(device, priority=-1)

    def exchange(rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Work]:
        assert not sent and not received
        target = torch.empty_like(rows)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            on_host.copy_(rows, non_blocking=True)
            target.copy_(on_host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        rows.record_stream(stream)  # the caching allocator must not hand either buffer out before the copies are done
        target.record_stream(stream)
        return target, event  # waits like NCCL: the current stream waits, the host does not

    return exchange
