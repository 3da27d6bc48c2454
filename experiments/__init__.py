import os
import signal
import sys
from typing import Any


def end_at_once(*_: Any) -> None:
    """Handle Ctrl-C while `python -m experiments.VERB` still imports; `command_line.call` then
    takes over."""
    os._exit(128 + signal.SIGINT)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
