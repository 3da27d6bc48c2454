"""SIGTERM to any rank: a flag, which the Strategy asks after at every step (fault 12).

All ranks then stop at the same step, with one whole checkpoint, and exit with 143 (128 + 15). Lightning's own handler
broadcasts from inside the signal, where the other ranks are in other collectives: a deadlock.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


class StopSignal:
    """Takes the process's SIGTERM; a Trainer in another thread than the main one is stopped by its owner."""

    def __init__(self) -> None:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.received = True
