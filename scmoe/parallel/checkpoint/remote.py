"""Checkpoints on a storage that fsspec reaches by a protocol, such as s3:// or gs://.

Such a storage can rename nothing. Each file of a save is uploaded under a name of its own, and the
manifest, which names them all, comes last. So an earlier checkpoint at the same path is whole until
the new one is. What a killed save has left is in no manifest: the next save to this path removes
it. A checkpoint is read from a copy on each machine.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.durable import MANIFEST, BrokenCheckpoint, Fingerprint
from scmoe.parallel.checkpoint.state import META
from scmoe.parallel.checkpoint.together import together
from scmoe.parallel.mesh import Mesh


@dataclass(frozen=True)
class Remote:
    """The path of a checkpoint on such a storage, as the user writes it."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def storage(self) -> tuple[Any, str]:
        """Return fsspec's file system, which has forgotten old listings, and the path in it."""
        files, path = url_to_fs(self.url)
        files.invalidate_cache()
        return files, path.rstrip("/")

    def exists(self) -> bool:
        """Return whether there is a whole checkpoint, or one file of another strategy."""
        files, path = self.storage()
        return has_manifest(self) or bool(files.isfile(path))

    def is_in(self, folder: str) -> bool:
        """Return whether it is below a folder."""
        return self.url.startswith(folder.rstrip("/") + "/") and ".." not in self.url.split("/")

    def remove(self) -> None:
        """Remove it, if it is there. If killed meanwhile, it leaves no whole checkpoint."""
        files, path = self.storage()
        if files.exists(f"{path}/{MANIFEST}"):
            files.rm_file(f"{path}/{MANIFEST}")
        if files.exists(path):
            files.rm(path, recursive=True)


Place = Path | Remote


def located(path: Any) -> Place:
    """Return where a path of Lightning is. file:// is a local path."""
    text = str(path)
    if get_protocol(text) not in ("file", "local"):
        return Remote(text)
    return Path(url_to_fs(text)[1]) if "://" in text else Path(text)


def scratch_folder(name: str) -> Path:
    """Return the path of a new folder on this machine, in TMPDIR. Remove those that ended processes
    have left there."""
    folder = Path(tempfile.gettempdir())
    durable.sweep(folder)
    return durable.partial_path(folder / name, durable.new_token())


class Upload:
    """A checkpoint that is written to a remote storage. Each rank has one.

    token: equal on all ranks, and of this save alone.
    """

    def __init__(self, remote: Remote, token: str) -> None:
        self.remote = remote
        self.prefix = f"{token[:8]}-"
        self.folder = scratch_folder(remote.name)  # where this rank writes

    def begin(self, rank: int) -> None:
        files, path = self.remote.storage()
        if rank == 0:
            files.makedirs(path, exist_ok=True)
        self.folder.mkdir(mode=0o700)

    def add(self, written: dict[str, Fingerprint]) -> dict[str, Fingerprint]:
        """Upload the files that this rank has written, and return them by their new names."""
        files, path = self.remote.storage()
        for name in written:
            with _errors_as_of_writing(self.remote):
                files.put_file(str(self.folder / name), f"{path}/{self.prefix}{name}")
        shutil.rmtree(self.folder)
        return {self.prefix + name: fingerprint for name, fingerprint in written.items()}

    def has(self, name: str, size: int) -> bool:
        """Return whether a file of this size is there."""
        files, path = self.remote.storage()
        return bool(files.exists(f"{path}/{name}") and files.size(f"{path}/{name}") == size)

    def commit(self, step: int, files: dict[str, Fingerprint], meta: str) -> None:
        """Make the checkpoint whole, and remove what was there before."""
        self.folder.mkdir(mode=0o700)
        (self.folder / META).write_text(meta, encoding="utf-8")
        named = files | self.add({META: durable.fingerprint(self.folder / META)})
        manifest = durable.sealed({"step": step, "files": named})
        storage, path = self.remote.storage()
        with _errors_as_of_writing(self.remote):
            storage.pipe_file(f"{path}/{MANIFEST}", manifest.encode())
        with suppress(Exception):  # the checkpoint is whole, and the next save removes the rest
            for file in storage.find(path):
                if file.rpartition("/")[2] not in (MANIFEST, *named):
                    storage.rm_file(file)

    def discard(self) -> None:
        """Remove what this rank has written, after an error.

        Uploaded files stay: a storage may have stored the manifest although it reported an
        error.
        """
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _errors_as_of_writing(remote: Remote) -> Iterator[None]:
    """Raise OSError for whatever a storage raises."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{remote} could not be written; older checkpoints are unchanged:"
            f" {type(error).__name__}: {error}"
        ) from error


def download(remote: Remote, folder: Path) -> None:
    """Copy a whole checkpoint into a new folder.

    BrokenCheckpoint: there is none, or it lacks a file.
    """
    files, path = remote.storage()
    try:
        text = files.cat_file(f"{path}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise durable.no_checkpoint(remote, files.exists(path), files.isfile(path)) from None
    manifest = durable.parsed(text, f"{remote}/{MANIFEST}")
    folder.mkdir(mode=0o700)
    (folder / MANIFEST).write_bytes(text)
    for name in manifest["files"]:
        if Path(name).name != name:
            raise BrokenCheckpoint(f"{remote}/{MANIFEST} is damaged: {name!r} is no file's name")
        try:
            files.get_file(f"{path}/{name}", str(folder / name))
        except FileNotFoundError:
            raise BrokenCheckpoint(f"{remote}/{name} is missing") from None


def has_manifest(place: Place) -> bool:
    """Return whether this looks like a whole checkpoint."""
    if isinstance(place, Path):
        return (place / MANIFEST).is_file()
    files, path = place.storage()
    return bool(files.exists(f"{path}/{MANIFEST}"))


@contextmanager
def downloaded(place: Place) -> Iterator[Path]:
    """Yield the local folder of a checkpoint; of a remote one it is a copy, which ends with this
    context. BrokenCheckpoint: as in `download`."""
    if isinstance(place, Path):
        yield place
        return
    folder = scratch_folder(place.name)
    try:
        download(place, folder)
        with _errors_naming(place, folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def on_each_machine(place: Place, mesh: Mesh) -> Iterator[Path]:
    """Yield the local folder of a checkpoint. Every rank must enter it.

    Of a remote one, the first rank of each machine makes a copy, which ends with this context. The
    last thing that ranks do inside must be a collective. BrokenCheckpoint: as in `download`.
    """
    if isinstance(place, Path):
        yield place
        return
    scratch = scratch_folder(place.name)
    folders: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(folders, (durable.machine(), scratch), group=mesh.checkpoint_group)
    folder = next(folder for machine, folder in folders if machine == durable.machine())
    try:
        together(mesh, lambda: download(place, scratch) if folder == scratch else None)
        with _errors_naming(place, folder):
            yield folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _errors_naming(remote: Remote, folder: Path) -> Iterator[None]:
    """Let errors about the copy name what the user knows."""
    try:
        yield
    except ValueError as error:
        error.args = (str(error).replace(str(folder), str(remote)),)
        raise
