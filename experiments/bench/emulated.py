"""Stand-ins for operators and for the network. Shapes, rows and gradients are those of the real ones.

Emulated operators sleep for a calibrated time, forward and backward, so that more ranks than cores can run in parallel
with real transfers. Backward takes twice as long, as for products: the input's gradient, and the weight's.
Exchanges without a network are free, or go over a GPU's bus to the host and back. Each is an Exchange for
parallel/wire/all_to_all_dispatcher.py, so all code around it is the code that runs between ranks.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from scmoe.moe.dispatcher import Ready, Traffic
from scmoe.parallel.wire.all_to_all import Exchange, Work


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

    num_weights: weights that change nothing and get gradients of 0, which travel like any other."""

    def __init__(self, ms: float, num_weights: int = 0) -> None:
        super().__init__()
        self.ms = ms
        self.weight = nn.Parameter(torch.zeros(num_weights)) if num_weights else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        return _Sleep.apply(x_BSD, self.ms / 1e3, self.weight)


class EmulatedExperts(nn.Module):
    """Replaces moe.experts.Experts: the identity, after us_per_row microseconds for each row."""

    def __init__(self, us_per_row: float, num_experts: int, expert_ids: range) -> None:
        super().__init__()
        self.us_per_row, self.num_experts, self.expert_ids = us_per_row, num_experts, expert_ids

    def forward(self, rows_RD: Tensor, counts_e: Tensor | None) -> Tensor:
        return _Sleep.apply(rows_RD, self.us_per_row * rows_RD.shape[0] / 1e6)


def free(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
    """Free communication: every rank keeps its rows, as if they came from its peers: as many as it sends."""
    assert traffic is None or sum(traffic.sent) == sum(traffic.received)
    return rows, Ready(rows)


@dataclass(frozen=True)
class OnStream:
    """Copies on a stream of their own, between two events. `wait` waits like NCCL's: the current stream waits for them,
    the host does not."""

    events: tuple[Any, Any]

    def wait(self) -> None:
        self.events[1].wait()


@dataclass(frozen=True)
class OnThread:
    """Copies by a thread, in the place of the stream on a machine without a GPU."""

    copied: Future[None]

    def wait(self) -> None:
        self.copied.result()


def over_the_bus(device: torch.device, rate: float = 1.0) -> Exchange:
    """Copies rows to pinned host memory and back on a separate stream, as an All-to-All between GPUs on PCIe without
    peer access does; one GPU is enough. The copies run in parallel with the computation of the current stream.

    rate: the transfers' rate, as a multiple of the bus's own. At 0.4 every row is copied 2.5 times. At 4 a quarter of
    the rows is copied to the host and back; the others stay on the device, like the rows that an All-to-All keeps.
    device: on a CPU a thread copies from memory to memory, so that the code around it can be tested.
    """
    if device.type != "cuda":
        thread = ThreadPoolExecutor(1, "over-the-bus")

        def exchange_on_host(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
            assert traffic is None
            target = torch.empty_like(rows)
            return target, OnThread(thread.submit(_there_and_back, rows, target, rate))

        return exchange_on_host
    stream = torch.cuda.Stream(device, priority=-1)

    def exchange(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        assert traffic is None
        target = torch.empty_like(rows)
        stream.wait_stream(torch.cuda.current_stream(device))
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            events[0].record()
            _there_and_back(rows, target, rate)
            events[1].record()
        rows.record_stream(stream)  # the caching allocator must not hand either buffer out before the copies are done
        target.record_stream(stream)
        return target, OnStream(events)

    return exchange


@torch.no_grad()
def _there_and_back(rows: Tensor, target: Tensor, rate: float) -> None:
    """Fills `target` with the rows; `travelling` says how many go to the host and back."""
    numbers = travelling(len(rows), rate)
    most = max(numbers, default=0)
    target[most:].copy_(rows[most:])
    on_host = torch.empty((most, *rows.shape[1:]), dtype=rows.dtype, pin_memory=rows.is_cuda and most > 0)
    for number in numbers:
        on_host[:number].copy_(rows[:number], non_blocking=True)
        target[:number].copy_(on_host[:number], non_blocking=True)


def travelling(num_rows: int, rate: float) -> list[int]:
    """Returns the number of rows of each trip to the host and back, num_rows / rate in all."""
    whole, part = divmod(1 / rate, 1)
    return [number for number in [num_rows] * int(whole) + [round(part * num_rows)] if number]
