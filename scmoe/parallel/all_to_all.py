"""All-to-All as two autograd nodes, start and wait, so that backward overlaps by the mirror (design idea 4).

    forward    start: launch the transfer           ...work...    wait: the rows are there
    backward   start: the gradient is there         ...work...    wait: launch the gradient's transfer

The autograd engine runs, of the nodes that are ready, the one created last: written as start; work; wait, the
gradient's transfer is launched before the work's backward and awaited after it. One node for both would launch and
wait in a breath.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class Transfer:
    """One All-to-All of rows, and later its gradient's way back. `wait` gives what `start` sent for.

    sent, received: rows to and from each rank of the group; empty: all equal, and nothing need know them.
    A buffer in flight is held here until its wait, so it cannot be freed or used again before.
    """

    def __init__(self, group: Any, sent: Sequence[int] = (), received: Sequence[int] = ()) -> None:
        self.group, self.sent, self.received = group, list(sent), list(received)
        self.out: Tensor | None = None
        self.source: Tensor | None = None
        self.work: dist.Work | None = None

    @torch.compiler.disable
    def start(self, rows: Tensor) -> Transfer:
        self.out = _Start.apply(rows, self)
        return self

    @torch.compiler.disable
    def wait(self) -> Tensor:
        out, self.out = self.out, None
        assert out is not None, "a transfer is started once and awaited once"
        return _Wait.apply(out, self)

    def launch(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        self.source = rows.contiguous()
        target = rows.new_empty((sum(received) if received else rows.shape[0], *rows.shape[1:]))
        self.work = dist.all_to_all_single(target, self.source, received, sent, group=self.group, async_op=True)
        return target

    def finish(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work = self.source = None


class _Start(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows, transfer.sent, transfer.received)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        transfer = ctx.transfer
        transfer.finish()
        grad, transfer.grad = transfer.grad, None
        return grad, None


class _Wait(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        transfer = ctx.transfer
        transfer.grad = transfer.launch(grad, transfer.received, transfer.sent)
        return grad, None  # a placeholder of the right shape: the engine wants one, start's backward has the real one
