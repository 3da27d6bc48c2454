"""A directory that is whole or absent, whatever happens while it is written (faults 1-6 of a checkpoint's life).

It is written beside its place under a hidden name, sealed with a manifest of every file's size and SHA-256, and
renamed. Readers check the seal. What a killed writer leaves behind is swept by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message names the file."""


def partial_path(path: Path, token: str) -> Path:
    """Where a directory is written before it is renamed to `path`."""
    return path.parent / f".{path.name}.tmp-{token}"


def fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def commit(partial: Path, path: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Seals `partial` and renames it to `path`. files: name -> fingerprint, of all files there."""
    write_durably(partial / MANIFEST, _seal({"step": step, "files": files}))
    sync(partial)
    old = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    if path.exists():
        os.rename(path, old)  # killed here, `sweep` puts it back
    os.rename(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(path: Path) -> int:
    """The step of a whole directory. BrokenCheckpoint: a file is missing, added, cut or changed."""
    if not (path / MANIFEST).is_file():
        raise BrokenCheckpoint(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    text = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        sealed = _seal({"step": manifest["step"], "files": manifest["files"]}).encode() == text
    except (ValueError, KeyError, TypeError):
        sealed = False
    if not sealed:
        raise BrokenCheckpoint(f"{path / MANIFEST} is damaged")
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    if odd := sorted(present ^ manifest["files"].keys()):
        raise BrokenCheckpoint(f"{path / odd[0]} is {'not of this checkpoint' if odd[0] in present else 'missing'}")
    for name, expected in manifest["files"].items():
        if (path / name).stat().st_size != expected["bytes"] or fingerprint(path / name) != expected:
            raise BrokenCheckpoint(f"{path / name} is damaged: its content is not what was written")
    return manifest["step"]


def newest_good(folder: Path) -> Path:
    """The whole checkpoint of the latest step; a warning names each one that is broken. Changes nothing, so that ranks
    may ask at once: one that a killed writer had moved aside counts where it lies.

    FileNotFoundError: there is none.
    """
    found = []
    for path in sorted([*folder.glob("*.ckpt"), *folder.glob(".*.ckpt.old-*")]):
        try:
            found.append((verify(path), path.stat().st_mtime, path))
        except BrokenCheckpoint as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    if not found:
        raise FileNotFoundError(f"{folder} has no whole checkpoint")
    return max(found)[2]


def remove(path: Path) -> None:
    """Removes a directory, if there is one. Killed meanwhile, it leaves none that lacks files; `sweep` has the rest."""
    if not path.exists():
        return
    aside = partial_path(path, uuid.uuid4().hex[:8])
    os.rename(path, aside)
    shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Removes what killed writers left in `folder`, and puts back what one had moved aside."""
    for aside in folder.glob(".*.old-*"):
        path = folder / aside.name[1:].rpartition(".old-")[0]
        if path.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, path)
    for partial in folder.glob(".*.tmp-*"):
        shutil.rmtree(partial)


def write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _seal(manifest: dict[str, Any]) -> str:
    """The manifest as text with its own hash: any other text is not it."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "seal": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
