"""Notes when each operator of a block runs.

An operator runs between two edges: identity functions that note the time, in forward when they are
passed, in backward when all their gradients have arrived. Nothing waits for a device, and results
stay bit-identical.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from scmoe.moe.operators import Direction
from scmoe.schedule.play import TRANSFERS, Span


class Mark(NamedTuple):
    """One edge that was passed. time: seconds, or a CUDA event."""

    operator: str
    direction: Direction
    begins: bool
    time: Any


class Recorder:
    """Records when the operators of one block run.

    A transfer that is waited for right after its start (moe.dispatcher.Blocking) is an operator
    like any other. A transfer that runs in parallel is noted by `watch`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.zero: Any = None  # the time from which `spans` counts, as `now` gave it; None: any
        self.marks: list[Mark] = []
        # direction, name, start, end; times as in Mark
        self.transfers: list[tuple[Direction, str, Any, Any]] = []
        self.watchers: list[threading.Thread] = []
        self.inside_operator = False

    def now(self) -> Any:
        """Return the time as a Mark has it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, name: str, f: Callable[..., Any], *inputs: Any) -> Any:
        """Return f(*inputs), run between two edges.

        An operator inside another one is not noted separately.
        """
        if self.inside_operator:
            return f(*inputs)
        inputs = _edge(self, name, True, inputs)
        self.inside_operator = True
        outputs = f(*inputs)
        self.inside_operator = False
        return _edge(self, name, False, outputs)

    def watch(self, name: str, direction: Direction, work: Any) -> None:
        """Note a transfer.

        On a host it lasts from now until it is done, and two threads must be able to wait for the
        work. On a CUDA device it lasts between the work's two `events`; without them (NCCL) it is
        not noted.
        """
        if self.device.type == "cuda":
            events = getattr(work, "events", None)
            if events is not None:
                self.transfers.append((direction, name, *events))
            return
        start = time.perf_counter()

        def note() -> None:
            work.wait()
            self.transfers.append((direction, name, start, time.perf_counter()))

        self.watchers.append(threading.Thread(target=note))
        self.watchers[-1].start()

    def spans(self, direction: Direction) -> list[Span]:
        """Return every operator that began and ended, in seconds of one clock.

        It waits for the device and the transfers.
        """
        while self.watchers:
            self.watchers.pop().join()
        seconds = self._clock()
        begun: dict[str, float] = {}
        spans = []
        for mark in self.marks:
            if mark.direction != direction or (self.transfers and mark.operator in TRANSFERS):
                continue
            if mark.begins:
                begun[mark.operator] = seconds(mark.time)
            elif mark.operator in begun:
                spans.append(Span(mark.operator, begun.pop(mark.operator), seconds(mark.time)))
        for transfer_direction, name, start, end in self.transfers:
            if transfer_direction == direction:
                spans.append(Span(name, seconds(start), seconds(end)))
        return sorted(spans, key=lambda span: span.start)

    def _clock(self) -> Callable[[Any], float]:
        if self.device.type != "cuda" or not self.marks:
            zero = self.zero or 0.0
            return lambda seconds: seconds - zero
        torch.cuda.synchronize(self.device)
        first = self.zero or self.marks[0].time
        return lambda event: first.elapsed_time(event) / 1e3


def _edge(recorder: Recorder, name: str, begins: bool, value: Any) -> Any:
    """Pass the tensors of `value` that carry a gradient through one edge.

    Return the value with the results.
    """
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    if torch.is_grad_enabled():
        _replace_tensors(value, collect)
    if not tensors:
        recorder.marks.append(Mark(name, "forward", begins, recorder.now()))
        return value
    passed = iter(_Edge.apply(recorder, name, begins, *tensors))
    return _replace_tensors(value, lambda _: next(passed))


def _replace_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with f of every tensor that carries a gradient, also in tuples and lists."""
    if isinstance(value, Tensor):
        return f(value) if value.requires_grad else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace_tensors(v, f) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_replace_tensors(v, f) for v in value)
    return value


class _Edge(Function):
    @staticmethod
    def forward(ctx, recorder: Recorder, name: str, begins: bool, *tensors: Tensor):
        ctx.recorder = recorder
        ctx.name = name
        ctx.begins = not begins  # of the operator's backward
        ctx.set_materialize_grads(False)
        recorder.marks.append(Mark(name, "forward", begins, recorder.now()))
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.recorder.marks.append(Mark(ctx.name, "backward", ctx.begins, ctx.recorder.now()))
        return None, None, None, *grads
