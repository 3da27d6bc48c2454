"""Writes a directory that is complete or absent, even if the writer is killed at any moment (faults
1-6).

The directory is written under a hidden name in the same folder, sealed with a manifest of every
file's size and SHA-256, and renamed. Readers check the seal. The next writer removes what a killed
one has left: the hidden name says which process writes.
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from scmoe.files import sync, write_durably

MANIFEST = "manifest.json"
# names given by `partial_path` and `commit`; the last three groups are the machine, the process and
# its start
ASIDE = re.compile(r"\.(.+)\.(old|tmp)-([0-9a-f]{8}(?:-([0-9a-f]{8})-(\d+)-(\d+))?)")
UNREAD = slice(0)  # `verify` reads none of the files
DAY_S = 86400


Fingerprint = dict[str, Any]  # a file's "bytes" and "sha256"


class BrokenCheckpoint(ValueError):
    """A checkpoint differs from what was written; the message names the file."""


class MissingCheckpoint(BrokenCheckpoint, FileNotFoundError):
    """There is nothing at the path. Every strategy of Lightning raises FileNotFoundError then."""


def new_token() -> str:
    """Return the end of a partial directory's name: 8 random digits, and this process."""
    return f"{uuid.uuid4().hex[:8]}-{machine()}-{os.getpid()}-{process_start(os.getpid()) or 0}"


def partial_path(path: Path, token: str) -> Path:
    """Return where a directory is written before it is renamed to `path`."""
    return path.parent / f".{path.name}.tmp-{token}"


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; each is durable."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def fingerprint(path: Path) -> Fingerprint:
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def commit(partial: Path, path: Path, step: int, files: dict[str, Fingerprint]) -> None:
    """Seal `partial` and rename it to `path`. files: name and fingerprint of all files in it."""
    write_durably(partial / MANIFEST, sealed({"step": step, "files": files}))
    sync(partial)
    old = partial
    if not os.path.lexists(path):
        os.rename(partial, path)
    elif not exchange(partial, path):
        old = path.parent / partial.name.replace(f".{path.name}.tmp-", f".{path.name}.old-")
        os.rename(path, old)  # killed here, `sweep` puts it back
        os.rename(partial, path)
    sync(path.parent)
    if old.is_symlink() or old.is_file():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once.

    Return False where the system, or this file system, cannot do that.
    """
    at_working_directory = -100  # AT_FDCWD
    both = 2  # RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    old, new = os.fsencode(one), os.fsencode(other)
    return bool(rename(at_working_directory, old, at_working_directory, new, both) == 0)


def verify(path: Path, share: slice = slice(None)) -> int:
    """Read all files and return the step.

    BrokenCheckpoint: one is missing, added, cut, changed or cannot be read.

    share: which of the files, in the order of their names, are read; of the others only the size is
    compared.
    """
    manifest = read_manifest(path)
    present = {
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith(".nfs")  # NFS keeps what a reader has open
    } - {MANIFEST}
    if odd := sorted(present ^ manifest["files"].keys()):
        raise BrokenCheckpoint(
            f"{path / odd[0]} is {'not of this checkpoint' if odd[0] in present else 'missing'}"
        )
    read = sorted(manifest["files"])[share]
    for name, expected in manifest["files"].items():
        try:
            is_intact = (path / name).stat().st_size == expected["bytes"]
            is_intact = is_intact and (name not in read or fingerprint(path / name) == expected)
        except OSError as error:
            raise BrokenCheckpoint(f"{path / name} cannot be read: {error.strerror}") from error
        if not is_intact:
            raise BrokenCheckpoint(f"{path / name} is damaged: its content is not what was written")
    return manifest["step"]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return {"step", "files"} of a checkpoint.

    BrokenCheckpoint: it has no manifest, or a damaged one, or there is nothing at the path
    (MissingCheckpoint).
    """
    if path.is_file() or not (path / MANIFEST).is_file():
        raise no_checkpoint(path, os.path.lexists(path), path.is_file())
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BrokenCheckpoint(f"{path / MANIFEST} cannot be read: {error.strerror}") from error
    return parsed(text, path / MANIFEST)


def no_checkpoint(path: Any, exists: bool, is_file: bool) -> BrokenCheckpoint:
    """Return the error for a path without a manifest."""
    if not exists:
        return MissingCheckpoint(f"{path} does not exist. Give the path of a checkpoint")
    if is_file:
        return BrokenCheckpoint(
            f"{path} is one file, which another strategy of Lightning has saved;"
            " ExpertParallelStrategy reads only the directories that it has saved itself. Load the"
            " file's state_dict into the module before fit instead"
        )
    return BrokenCheckpoint(f"{path} is not a complete checkpoint: it has no {MANIFEST}")


def parsed(text: bytes, name: Any) -> dict[str, Any]:
    """Return {"step", "files"} of a manifest's text. BrokenCheckpoint: it is damaged. name: of the
    file."""
    try:
        manifest = json.loads(text)
        written = sealed({"step": manifest["step"], "files": manifest["files"]}).encode()
    except (ValueError, KeyError, TypeError):
        written = None
    if written != text:
        raise BrokenCheckpoint(f"{name} is damaged")
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints of a folder, complete or not.

    One that a killed writer has moved aside is among them.
    """
    moved = [aside for aside, name in _asides(folder, "old") if name.endswith(".ckpt")]
    return [*folder.glob("*.ckpt"), *moved]


def rank_in_step(path: Path) -> tuple[bool, float]:
    """Return which of two checkpoints of one step is taken: the higher value.

    One that a validation has saved, `best-step=N`, has that validation; the times of a copied run
    say nothing.
    """
    return path.name.removeprefix(".").startswith("best-"), path.stat().st_mtime


def newest_good(
    folder: Path, prefix: str = "", share: slice = slice(None), step: int | None = None
) -> Path:
    """Return the complete checkpoint of the latest step; a warning names each broken one.

    Ranks may call it at once.

    prefix: of the names to choose from. Manifests say which is the newest. Files are read of that
    one only, or of the next one if it is broken. share: as in `verify`. step: the only one to
    choose from. FileNotFoundError: there is none.
    """
    candidates = []
    for path in checkpoints(folder):
        # one that was moved aside begins with a dot
        if not path.name.removeprefix(".").startswith(prefix):
            continue
        try:
            candidates.append((read_manifest(path)["step"], rank_in_step(path), path))
        except (BrokenCheckpoint, FileNotFoundError) as error:  # a training may remove it
            warnings.warn(f"passed over: {error}", stacklevel=2)
    for candidate_step, _, path in sorted(candidates, reverse=True):
        if step not in (None, candidate_step):
            continue
        try:
            verify(path, share)
            return path
        except BrokenCheckpoint as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    raise FileNotFoundError(f"{folder} has no whole checkpoint")


def remove(path: Path) -> None:
    """Remove a directory, if there is one.

    If killed meanwhile, it leaves no incomplete one under this name. Of a link only the link itself
    is removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        aside = partial_path(path, new_token())
        os.rename(path, aside)
        # NFS keeps what a reader holds open; `sweep` removes it later
        shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed writers left in `folder`, and restore what one had moved aside.

    What another process still writes stays. name: of the checkpoint that is written next.
    """
    for aside, moved in _asides(folder, "old"):
        if not _is_being_written(aside, name):
            # its writer has meanwhile ended, or another process sweeps as well
            with suppress(OSError):
                if (folder / moved).exists():
                    shutil.rmtree(aside)
                else:
                    os.rename(aside, folder / moved)
    for partial, _ in _asides(folder, "tmp"):
        if not _is_being_written(partial, name):
            shutil.rmtree(partial, ignore_errors=True)


def _is_being_written(aside: Path, name: str) -> bool:
    """Return whether another process may still write it.

    A process of another machine cannot be seen from here: it counts as ended if it wrote under the
    name that is written next, or changed nothing for a day.
    """
    named = ASIDE.fullmatch(aside.name)
    assert named is not None, "it is one of _asides"
    if named[4] == machine() and named[6] != "0":
        return named[5] != str(os.getpid()) and process_start(int(named[5])) == named[6]
    with suppress(OSError):
        return named[1] != name and time.time() - aside.stat().st_mtime < DAY_S
    return False


def machine() -> str:
    """Return 8 digits for this host and its process ids.

    A container has its own ids, perhaps under the host's name.
    """
    with suppress(OSError):
        return hashlib.sha256(
            f"{platform.node()} {os.readlink('/proc/self/ns/pid')}".encode()
        ).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def process_start(pid: int) -> str | None:
    """Return when the process started, in clock ticks since boot.

    None: it does not exist, or there is no /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    # Z: it has ended, and its parent has not read its exit code
    return None if state in "ZX" else fields[18]


def _asides(folder: Path, kind: str) -> Iterator[tuple[Path, str]]:
    """Yield the directories that a writer has left, and their final names.

    kind: "old" or "tmp".
    """
    for path in sorted(folder.glob(f".*.{kind}-*")):
        named = ASIDE.fullmatch(path.name)
        if named and named[2] == kind and path.is_dir() and not path.is_symlink():
            yield path, named[1]


def sealed(manifest: dict[str, Any]) -> str:
    """Return the manifest as text with its own hash; any other text is refused."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps(
        {**manifest, "seal": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True
    )
