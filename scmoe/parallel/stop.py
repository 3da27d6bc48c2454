"""SIGTERM to any rank: all ranks stop at the same step, with one whole checkpoint, and exit with 143 (128 + 15).

The handler only sets a flag. Flags are added up in an all-reduce that is started at one batch and read at the next, so
nothing ever waits for it, and every rank reads the same sum at the same batch. (Lightning's own handler broadcasts from
inside the signal, where the other ranks are in other collectives: a deadlock.)
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EXIT_CODE = 128 + signal.SIGTERM


class StopTogether:
    """group: a gloo group of all ranks that carries nothing else."""

    def __init__(self, group: Any) -> None:
        self.group, self.requested = group, False
        self.in_flight: tuple[dist.Work, Tensor] | None = None
        self.previous: Any = None

    def listen(self) -> None:
        """Takes the process's SIGTERM; a Trainer in another thread than the main one is stopped by its owner."""
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: Any) -> None:
        self.requested = True

    def agreed(self) -> bool:
        """Whether some rank had been asked to stop at the batch before; every rank must call it at every batch."""
        stop = False
        if self.in_flight is not None:
            work, flags = self.in_flight
            work.wait()
            stop = bool(flags.item())
        flags = torch.tensor(int(self.requested))
        self.in_flight = (dist.all_reduce(flags, group=self.group, async_op=True), flags)
        return stop

    def close(self) -> None:
        if self.in_flight is not None:
            self.in_flight[0].wait()
            self.in_flight = None
