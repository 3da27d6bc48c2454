"""`python -m scmoe VERB ...` is the command `scmoe VERB ...`."""

import os
import signal
from typing import Any


def end_at_once(*_: Any) -> None:
    """Handle Ctrl-C during the imports below; `command_line.call` takes over after them."""
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    from scmoe.command_line import main

    main()
