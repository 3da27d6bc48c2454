"""Writes a directory that is complete or absent, even if the writer is killed at any moment (faults 1-6).

The directory is written under a hidden name in the same folder, sealed with a manifest of every file's size and
SHA-256, and renamed. Readers check the seal. The next writer removes what a killed one has left.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
ASIDE = re.compile(r"\.(.+)\.(old|tmp)-[0-9a-f]{8}")  # names given by `partial_path` and `commit`


class BrokenCheckpoint(ValueError):
    """A checkpoint differs from what was written; the message names the file."""


def partial_path(path: Path, token: str) -> Path:
    """Return where a directory is written before it is renamed to `path`. token: 8 hexadecimal digits."""
    return path.parent / f".{path.name}.tmp-{token}"


def fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def commit(partial: Path, path: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Seal `partial` and rename it to `path`. files: name and fingerprint of all files in it."""
    write_durably(partial / MANIFEST, _seal({"step": step, "files": files}))
    sync(partial)
    old = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    if path.exists():
        os.rename(path, old)  # killed here, `sweep` puts it back
    os.rename(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which it replaces at the end, and not if writing it fails."""
    partial = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        partial.chmod(0o644)  # so that other users can read it
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def verify(path: Path) -> int:
    """Read all files and return the step. BrokenCheckpoint: one is missing, added, cut, changed or cannot be read."""
    manifest = read_manifest(path)
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    if odd := sorted(present ^ manifest["files"].keys()):
        raise BrokenCheckpoint(f"{path / odd[0]} is {'not of this checkpoint' if odd[0] in present else 'missing'}")
    for name, expected in manifest["files"].items():
        try:
            whole = (path / name).stat().st_size == expected["bytes"] and fingerprint(path / name) == expected
        except OSError as error:
            raise BrokenCheckpoint(f"{path / name} cannot be read: {error.strerror}") from error
        if not whole:
            raise BrokenCheckpoint(f"{path / name} is damaged: its content is not what was written")
    return manifest["step"]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return {"step", "files"} of a checkpoint. BrokenCheckpoint: it has no manifest, or a damaged one."""
    if not (path / MANIFEST).is_file():
        raise BrokenCheckpoint(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        sealed = _seal({"step": manifest["step"], "files": manifest["files"]}).encode() == text
    except OSError as error:
        raise BrokenCheckpoint(f"{path / MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        sealed = False
    if not sealed:
        raise BrokenCheckpoint(f"{path / MANIFEST} is damaged")
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder, complete or not, also one that a killed writer has moved aside."""
    moved = [aside for aside, name in _asides(folder, "old") if name.endswith(".ckpt")]
    return [*folder.glob("*.ckpt"), *moved]


def newest_good(folder: Path, prefix: str = "") -> Path:
    """Return the complete checkpoint of the latest step; a warning names each broken one. Ranks may call it at once.

    prefix: of the names to choose from. Manifests say which is the newest. All files are read of that one only, or of
    the next one if it is broken.
    FileNotFoundError: there is none.
    """
    found = []
    for path in checkpoints(folder):
        if not path.name.removeprefix(".").startswith(prefix):  # one that was moved aside begins with a dot
            continue
        try:
            found.append((read_manifest(path)["step"], path.stat().st_mtime, path))
        except BrokenCheckpoint as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    for _, _, path in sorted(found, reverse=True):
        try:
            verify(path)
        except BrokenCheckpoint as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return path
    raise FileNotFoundError(f"{folder} has no whole checkpoint")


def remove(path: Path) -> None:
    """Remove a directory, if there is one. If killed meanwhile, it leaves no incomplete one under this name."""
    if not path.exists():
        return
    aside = partial_path(path, uuid.uuid4().hex[:8])
    os.rename(path, aside)
    shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`, and restore what one had moved aside."""
    for aside, name in _asides(folder, "old"):
        if (folder / name).exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, folder / name)
    for partial, _ in _asides(folder, "tmp"):
        shutil.rmtree(partial)


def _asides(folder: Path, kind: str) -> Iterator[tuple[Path, str]]:
    """Yield the directories of this kind, "old" or "tmp", that a writer has left, and their final names."""
    for path in sorted(folder.glob(f".*.{kind}-*")):
        named = ASIDE.fullmatch(path.name)
        if named and named[2] == kind and path.is_dir() and not path.is_symlink():
            yield path, named[1]


def write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _seal(manifest: dict[str, Any]) -> str:
    """Return the manifest as text with its own hash; any other text is refused."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "seal": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
