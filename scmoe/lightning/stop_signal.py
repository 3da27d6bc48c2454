"""SIGTERM or Ctrl-C on any rank sets a flag; ranks exchange their flags at every step and stop at one step (fault 12).

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
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """The process's SIGTERM and SIGINT (Ctrl-C) as a flag, `received`. Only the main thread can take signals."""

    def __init__(self) -> None:
        self.received = False
        self.exit_code = EXIT_CODE
        self.before: dict[int, Any] = {}  # the handlers that were replaced

    def take(self) -> None:
        """From here on a signal only sets the flag, unless it is ignored; a second Ctrl-C interrupts at once."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number not in self.before and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def give_back(self) -> None:
        """From here on a signal does what it did before `take`; by default SIGTERM ends the process at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, _: Any) -> None:
        self.received, self.exit_code = True, 128 + number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])


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
