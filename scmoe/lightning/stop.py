"""Turns signals that ask this process to stop into a flag, which the ranks read at their next step.

SIGTERM, SIGHUP (a terminal that is gone) and Ctrl-C set `received`. Lightning's own handlers
broadcast or save inside the signal handler, while other ranks are in other collectives: a deadlock.
So they are not installed. Under SLURM the signal that asks to requeue the job (SIGUSR1) sets a flag
too; at the agreed step the ranks do what Lightning's handler does (job.py).
"""

import math
import os
import signal
import threading
import time
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# a second Ctrl-C within this time is the same one: a key pressed twice, or sent by a wrapper too
AGAIN_S = 1.0


class StopSignal:
    """The process's SIGNALS as a flag, `received`. Only the main thread can take signals.

    requeue: the signal that asks to requeue a SLURM job, which sets the flag `must_requeue` too;
    None: there is none.
    code_of_second: the exit code at a second Ctrl-C.
    """

    def __init__(self, requeue: int | None = None, code_of_second: int = INTERRUPTED) -> None:
        self.received = False
        self.must_requeue = False
        self.exit_code = EXIT_CODE
        self.code_of_second = code_of_second
        self.requeue = requeue
        self.interrupted_s = math.inf  # the time of the first Ctrl-C
        self.before: dict[int, Any] = {}  # the handlers that were replaced

    @property
    def numbers(self) -> tuple[int, ...]:
        return SIGNALS if self.requeue is None else (*SIGNALS, self.requeue)

    def take(self) -> None:
        """Let a signal only set the flag, unless it is ignored.

        A second Ctrl-C, AGAIN_S after the first or later, ends the process at once.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.numbers:
            if number not in self.before and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def give_back(self) -> None:
        """Let a signal do what it did before `take`; by default SIGTERM ends the process."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, _: Any) -> None:
        self.received = True
        self.exit_code = 128 + number
        self.must_requeue = self.must_requeue or number == self.requeue
        if number == signal.SIGHUP:
            discard_output_of_closed_terminal()
        if number == signal.SIGINT:
            seconds = time.monotonic()
            if seconds - self.interrupted_s > AGAIN_S:
                raise SystemExit(self.code_of_second)
            self.interrupted_s = min(self.interrupted_s, seconds)


def discard_output_of_closed_terminal() -> None:
    """Discard what this process prints where its terminal is gone.

    Writing would raise before the save.
    """
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
