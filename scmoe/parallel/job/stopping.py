"""SIGTERM on any rank sets a flag; all ranks exchange their flags at every step and stop at the same one (fault 12).

Lightning's own handler broadcasts inside the signal handler, while other ranks are in other collectives: a deadlock.
So it is not installed.
"""

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EXIT_CODE = 128 + signal.SIGTERM


class StopSignal:
    """The process's SIGTERM as a flag, `received`. Only the main thread can take the signal."""

    def __init__(self) -> None:
        self.received = False
        self.before: Any = None  # the handler that was replaced; None while it is installed

    def take(self) -> None:
        """From here on a SIGTERM only sets the flag."""
        if self.before is None and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL

    def give_back(self) -> None:
        """From here on a SIGTERM does what it did before `take`; by default it ends the process at once."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def _note(self, *_: Any) -> None:
        self.received = True


class Poll:
    """Sums flags over all ranks. Each sum is started in one call and read in the next, so that no call waits for it.

    group: a gloo group of all ranks that carries nothing else at the same time.
    """

    def __init__(self, group: Any, num_flags: int) -> None:
        self.group, self.num_flags = group, num_flags
        self.in_flight: tuple[dist.Work, Tensor] | None = None

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank raised it in the call before. All ranks must call it equally often."""
        answers = self.close()
        sums = torch.tensor(flags, dtype=torch.int64)
        self.in_flight = (dist.all_reduce(sums, group=self.group, async_op=True), sums)
        return answers

    def smallest(self, count: float) -> float:
        """Wait for the smallest count of all ranks. Every rank must call it."""
        least = torch.tensor(count, dtype=torch.float64)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return least.item()

    def close(self) -> list[bool]:
        """Wait for the sum in flight and return it; all False if there is none."""
        if self.in_flight is None:
            return [False] * self.num_flags
        work, sums = self.in_flight
        work.wait()
        self.in_flight = None
        return [bool(n) for n in sums]
