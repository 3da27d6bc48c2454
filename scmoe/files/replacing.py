"""Writes files that survive a crash: a file is complete and on the disk, or as it was before."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which it replaces at the end, and not if writing it fails.

    Its suffix is the same, as some writers choose the format by it.
    """
    partial = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the process's umask says; safetensors would let only this user read it
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
