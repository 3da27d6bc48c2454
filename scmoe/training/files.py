"""Writes files that a run can do without (fault 32): a full disk costs these files and one warning, not the run.

Each file is written under another name and renamed, so an earlier version of it stays whole. Checkpoints are written
elsewhere (durable.py): for them a full disk is an error.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    try_to_write(path, lambda partial: partial.write_text(text))


def try_to_write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write_aside(path, write)
    except OSError as error:
        warn_once(f"{path} is not written: {error.strerror or error}")


def try_to_draw(path: Path, draw: Callable[[Path], object]) -> None:
    """Draw a picture. Whatever the drawing raises is one warning: the checkpoint of the last step is saved after it."""
    try:
        try_to_write(path, draw)
    except Exception as error:
        warn_once(f"{path} is not drawn: {type(error).__name__}: {error}")


def try_to_append(path: Path, text: str) -> None:
    """Add a text to a file that may not exist yet. Where it cannot be written, the file is as before."""
    size = path.stat().st_size if path.exists() else None
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True) if size is None else os.truncate(path, size)
        warn_once(f"{path} gets no more rows: {error.strerror or error}")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file of another name with the same suffix, then rename it to `path`.

    Raises OSError where it cannot be written, such as on a full disk; an earlier version is then unchanged.
    """
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
