"""SIGTERM to any rank: a flag, which the Strategy asks after at every step (fault 12).

All ranks then stop at the same step, with one whole checkpoint, and exit with 143 (128 + 15). Lightning's own handler
broadcasts from inside the signal, where the other ranks are in other collectives: a deadlock. So it is not let in.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EXIT_CODE = 128 + signal.SIGTERM


class StopSignal:
    """Takes the process's SIGTERM; a Trainer in another thread than the main one is stopped by its owner.

    connector: the Trainer's, which sets Lightning's handlers when the Strategy is set up already; all but this one.
    """

    def __init__(self, connector: Any) -> None:
        self.received = False
        self.before: Any = None  # the handler that was there; None: it is there now
        connector._register_signal = partial(_register_others, type(connector)._register_signal)
        self.take()

    def take(self) -> None:
        """From here on a SIGTERM is noted, and somebody must ask."""
        if self.before is None and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL

    def give_back(self) -> None:
        """From here on a SIGTERM does what it did before, which is to end the process at once if nobody has had it."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def _note(self, *_: Any) -> None:
        self.received = True


def _register_others(register: Callable[..., None], number: int, handler: Any) -> None:
    if number != signal.SIGTERM:
        register(number, handler)


class Poll:
    """Flags of all ranks, added up: the sum is started at one batch and read at the next, so it has long been there.

    group: a gloo group of all ranks that carries nothing else.
    """

    def __init__(self, group: Any, num_flags: int) -> None:
        self.group, self.num_flags = group, num_flags
        self.in_flight: tuple[dist.Work, Tensor] | None = None

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag whether some rank had raised it at the call before. Every rank must call it as often."""
        answers = self.close()
        sums = torch.tensor(flags, dtype=torch.int64)
        self.in_flight = (dist.all_reduce(sums, group=self.group, async_op=True), sums)
        return answers

    def smallest(self, count: float) -> float:
        """The smallest count of all ranks, waited for: how often all of them can ask. Every rank must call it."""
        least = torch.tensor(count, dtype=torch.float64)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return least.item()

    def close(self) -> list[bool]:
        """Waits for what is in flight, if anything."""
        if self.in_flight is None:
            return [False] * self.num_flags
        work, sums = self.in_flight
        work.wait()
        self.in_flight = None
        return [bool(n) for n in sums]
