"""Files of a run whose loss must not stop it (fault 32): a full disk costs them, with one warning, and nothing else.

Each is written beside its place and renamed, so that what was there before stays whole. Checkpoints are not of this
kind: there a full disk is an error (durable.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path


def try_to_write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_aside(path, write)
    except OSError as error:
        warn_once(f"{path} is not written: {error.strerror or error}")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file under another name with the same suffix, then gives it its own. OSError: the disk is full
    or the like, and what was there is as it was."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@cache
def warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
