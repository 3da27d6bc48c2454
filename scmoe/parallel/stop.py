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
