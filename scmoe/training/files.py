"""Writes files that a run can do without, and removes keys from what a run keeps of itself.

A full disk costs these files and one warning, not the run (fault 32); an earlier version stays whole. What a run
cannot do without is written by durable.py: for it a full disk is an error. Keys are in configs, command lines and
changes to the code (fault 33).
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scmoe.files.writing import replacing

STARS = "*****"
KEY_NAMES = re.compile(  # of environment variables that hold keys; PWD and OLDPWD are folders
    r"(KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|_PWD|CREDENTIALS?)$", re.IGNORECASE
)
SHORTEST_KEY = 8  # characters of a key; a shorter value would also match harmless text
KEY_SHAPES = re.compile(
    r"(?<![\w/])[0-9a-f]{40}(?![\w/])"  # W&B's; within a path it is the name of a snapshot
    r"|wandb_v\d+_\w{20,}|hf_[A-Za-z0-9]{20,}"
)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    try_to_write(path, lambda partial: partial.write_text(text))


def try_to_write(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file that replaces `path`; where it cannot be written, warn and leave `path` as it was."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            write(partial)
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


@cache
def warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def redacted(value: Any, variables: Mapping[str, str] = os.environ) -> Any:
    """Return `value` with stars for keys, in texts, lists, mappings and dataclasses.

    Keys are what looks like one of W&B or Hugging Face, and the lines of variables with one of KEY_NAMES.
    """
    lines = {line.strip() for name, text in variables.items() if KEY_NAMES.search(name) for line in text.splitlines()}
    keys = sorted((line for line in lines if len(line) >= SHORTEST_KEY), key=len, reverse=True)
    return _starred(value, re.compile("|".join([*map(re.escape, keys), KEY_SHAPES.pattern])))


def _starred(value: Any, keys: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return keys.sub(STARS, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_starred(v, keys) for v in value)
    if isinstance(value, dict):
        return {k: _starred(v, keys) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _starred(getattr(value, f.name), keys) for f in fields(value)})
    return value
