"""Stand-ins for operators and for the network. Shapes, rows and gradients are those of the real
ones.

Emulated operators sleep for a calibrated time, forward and backward, so that more ranks than cores
can run in parallel with real transfers. Backward takes twice as long, as for products: the input's
gradient, and the weight's. Exchanges without a network are free, or go over a GPU's bus to the host
and back. Each is an Exchange for parallel/wire/all_to_all.py, so all code around it is the code
that runs between ranks.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from scmoe.moe.dispatcher import Ready, Traffic
from scmoe.parallel.wire.all_to_all import Exchange, Work

# Of the products of an attention of width D over S tokens, 6 D^2 + 2 D S (causal) + 2 D^2 a token,
# the last are the output projection's: 0.22 to 0.17 for S from D / 2 to 2 D.
OUT_PART = 0.2


class _Sleep(Function):
    @staticmethod
    def forward(ctx, x: Tensor, seconds: float, weight: Tensor | None = None):
        ctx.seconds, ctx.weight = seconds, weight
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        time.sleep(2 * ctx.seconds)
        return grad, None, None if ctx.weight is None else torch.zeros_like(ctx.weight)


class EmulatedOperator(nn.Module):
    """Replaces a sub-layer or a shared expert: the identity, after `ms` milliseconds.

    num_weights: weights that change nothing and get gradients of 0, which travel like any other.
    tokens: those that take `ms`; None: any number does."""

    def __init__(self, ms: float, num_weights: int = 0, tokens: int | None = None) -> None:
        super().__init__()
        self.ms, self.tokens = ms, tokens
        self.weight = nn.Parameter(torch.zeros(num_weights)) if num_weights else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        part = 1.0 if self.tokens is None else x_BSD.shape[:-1].numel() / self.tokens
        return _Sleep.apply(x_BSD, part * self.ms / 1e3, self.weight)


class EmulatedAttention(nn.Module):
    """Replaces an attention sub-layer, which has two parts: its output projection takes OUT_PART of
    `ms`, and its core the rest. Arguments as above. onto: as Residual's; None: the sub-layer is the
    identity."""

    parted = True

    def __init__(self, ms: float, num_weights: int = 0, tokens: int | None = None) -> None:
        super().__init__()
        self.core = EmulatedOperator((1 - OUT_PART) * ms, 3 * num_weights // 4, tokens)
        self.out = EmulatedOperator(OUT_PART * ms, num_weights // 4, tokens)

    def forward(
        self, x_BSD: Tensor, onto: Tensor | None = None, core: Tensor | None = None
    ) -> Tensor:
        y_BSD = self.out(self.core(x_BSD) if core is None else core)
        return y_BSD if onto is None else onto + y_BSD


class EmulatedExperts(nn.Module):
    """Replaces moe.experts.Experts: the identity, after us_per_row microseconds for each row that
    is not empty."""

    def __init__(self, us_per_row: float, num_experts: int, expert_ids: range) -> None:
        super().__init__()
        self.us_per_row = us_per_row
        self.num_experts = num_experts
        self.expert_ids = expert_ids

    def forward(self, rows_RD: Tensor, counts_e: Tensor | None) -> Tensor:
        num_rows = rows_RD.shape[0] if counts_e is None else int(counts_e.sum())
        return _Sleep.apply(rows_RD, self.us_per_row * num_rows / 1e6)


def free(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
    """Return the same rows at once, as if they came from the peers.

    A rank gets as many as these would send: where it has fewer, the others are zero.
    """
    missing = 0 if traffic is None else sum(traffic.received) - len(rows)
    if missing > 0:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    elif missing < 0:
        rows = rows[:missing]
    return rows, Ready(rows)


@dataclass(frozen=True)
class OnStream:
    """Copies on a stream of their own, between two events. `wait` waits like NCCL's: the current
    stream waits for them, the host does not."""

    events: tuple[Any, Any]

    def wait(self) -> None:
        self.events[1].wait()


def over_the_bus(device: torch.device, rate: float = 1.0) -> Exchange:
    """Copy rows to pinned host memory and back on a separate stream, as an All-to-All between
    GPUs on PCIe without peer access does; one GPU is enough. The copies run in parallel with the
    computation of the current stream.

    rate: the transfers' rate, as a multiple of the bus's own. At 0.4 every row is copied 2.5 times.
    At 4 a quarter of the rows is copied to the host and back; the others stay on the device, like
    the rows that an All-to-All keeps. device: on a CPU rows are copied from memory to memory at
    once, so that the code around it can be tested.
    """
    stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def exchange(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        assert traffic is None
        target = torch.empty_like(rows)
        if stream is None:
            _there_and_back(rows, target, rate)
            return target, Ready(target)
        stream.wait_stream(torch.cuda.current_stream(device))
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            events[0].record()
            _there_and_back(rows, target, rate)
            events[1].record()
        # the caching allocator must not hand either buffer out before the copies are done
        rows.record_stream(stream)
        target.record_stream(stream)
        return target, OnStream(events)

    return exchange


@torch.no_grad()
def _there_and_back(rows: Tensor, target: Tensor, rate: float) -> None:
    """Fill `target` with the rows; `travelling` says how many go to the host and back."""
    numbers = travelling(len(rows), rate)
    most = max(numbers, default=0)
    target[most:].copy_(rows[most:])
    on_host = torch.empty(
        (most, *rows.shape[1:]), dtype=rows.dtype, pin_memory=rows.is_cuda and most > 0
    )
    for number in numbers:
        on_host[:number].copy_(rows[:number], non_blocking=True)
        target[:number].copy_(on_host[:number], non_blocking=True)


def travelling(num_rows: int, rate: float) -> list[int]:
    """Return the number of rows of each trip to the host and back, num_rows / rate in all."""
    whole, part = divmod(1 / rate, 1)
    return [number for number in [num_rows] * int(whole) + [round(part * num_rows)] if number]
