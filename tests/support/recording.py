"""These dispatchers and modules record when they run, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, is_parted
from scmoe.moe.dispatcher import Announced, ChunkCounts, LocalDispatcher, Pending, Receipt
from scmoe.schedule.schedule import Schedule
from tests.support.models import DIM, FFN, randomise, tiny_shortcut, tiny_stream, tiny_sublayers


class _Mark(Function):
    """This identity function writes its name into a log when it runs forward and when it runs
    backward."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, log: "Log") -> Tensor:
        ctx.name, ctx.log = name, log
        log.forward.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.log.backward.append(ctx.name)
        return grad, None, None


@dataclass
class Log:
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)

    def mark(self, x: Tensor, name: str) -> Tensor:
        return _Mark.apply(x, name, self)


class Recorded(nn.Module):
    """This module runs `inner`, with a mark before and after it."""

    def __init__(self, name: str, inner: Any, log: Log) -> None:
        super().__init__()
        self.name, self.inner, self.log = name, inner, log

    @property
    def parted(self) -> bool:
        return is_parted(self.inner)

    def core(self, x: Tensor) -> Tensor:
        return self.marked(f"{self.name}_core", self.inner.core, x)

    def forward(
        self, x: Tensor, *rest, onto: Tensor | None = None, core: Tensor | None = None
    ) -> Tensor:
        if core is None:
            return self.marked(self.name, lambda x: self.inner(x, *rest), x)
        return self.marked(
            f"{self.name}_out", lambda core: self.inner(x, onto=onto, core=core), core
        )

    def marked(self, name: str, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.log.mark(f(self.log.mark(x, f"{name} begin")), f"{name} end")


@dataclass(frozen=True)
class RecordedPending:
    inner: Pending
    name: str
    log: Log

    def wait(self) -> Tensor:
        return self.log.mark(self.inner.wait(), self.name)


class RecordingDispatcher:
    """This dispatcher marks where a transfer starts and where it is waited for: the two autograd
    nodes."""

    def __init__(self, log: Log) -> None:
        self.log, self.inner = log, LocalDispatcher()
        self.dispatches, self.combines = 0, 0

    def announce(self, counts_PE: Tensor) -> Announced:
        return self.inner.announce(counts_PE)

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        chunk, self.dispatches = self.dispatches, self.dispatches + 1
        pending, receipt = self.inner.dispatch(
            self.log.mark(rows_RD, f"dispatch {chunk} start"), counts
        )
        return RecordedPending(pending, f"dispatch {chunk} wait", self.log), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        chunk, self.combines = self.combines, self.combines + 1
        pending = self.inner.combine(self.log.mark(rows_RD, f"combine {chunk} start"), receipt)
        return RecordedPending(pending, f"combine {chunk} wait", self.log)


def recorded_shortcut_block(
    schedule: Schedule, capacity_factor: float | None, log: Log, blocking=None
) -> ShortcutBlock:
    """Return a ScMoE pair whose operators and transfers write into log. blocking: a wrapper of the
    dispatcher."""
    dispatcher = RecordingDispatcher(log)
    stream = tiny_stream(2, capacity_factor, blocking(dispatcher) if blocking else dispatcher)
    stream.experts = Recorded("experts", stream.experts, log)
    names = ("attention", "mlp", "attention")
    sublayers = [
        Recorded(name, sublayer, log)
        for name, sublayer in zip(names, tiny_sublayers(), strict=True)
    ]
    shared_expert = Recorded("shared_expert", MLP(DIM, FFN), log)
    return randomise(tiny_shortcut(stream, schedule, sublayers, shared_expert).double(), seed=1)


def between(log: list[str], first: str, last: str) -> list[str]:
    """Return the operators of the backbone and the experts that end between two events."""
    part = log[log.index(first) + 1 : log.index(last)]
    return [name.split()[0] for name in part if name.endswith(" end")]
