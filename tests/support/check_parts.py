"""Parts that fail, hang and crash, for tests of what runs them in isolation."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.engine.isolated import Place


def pieces(place: Place, second: str, argument: str = "") -> dict[str, Callable[[], Any]]:
    """Return two pieces: the first measures, the second does what its name says."""
    return {"first": lambda: {"value": 1}, second: lambda: DOES[second](argument)}


def fail(argument: str) -> None:
    raise ValueError(f"as wanted {argument}")


def hang(path: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(path).write_text(str(child.pid))
    print("waiting")
    time.sleep(300)


def crash(argument: str) -> None:
    print("about to crash", flush=True)
    os.abort()


def measure(argument: str) -> dict[str, int]:
    return {"value": 2}


DOES = {"fail": fail, "hang": hang, "crash": crash, "measure": measure}
