"""Writes files that survive a crash, and files that a run can do without; and removes keys.

A file that must be there (`replacing`, `write_durably`, `write_whole`) is complete and on the disk,
or as it was before: for it a full disk is an error. Where a run can do without a file
(`try_to_write`), a full disk costs this file and one warning, not the run (fault 32); an earlier
version stays whole.

Safetensors files are written one tensor after another, so that memory holds one of them. Such a
file is the length of its index in 8 bytes, the index in JSON, padded with spaces so that the data
is aligned, and the tensors' bytes without gaps.

Keys (passwords of services) may stand in configs, command lines and changes to the code, which a
run keeps. They are replaced by stars (fault 33).
"""

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS_DTYPES = {  # of torch: as safetensors calls them
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.uint64": "U64",
    "torch.uint32": "U32",
    "torch.uint16": "U16",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which it replaces unless writing it fails.

    Its suffix is the same, as some writers choose the format by it.
    """
    partial = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        partial.touch()
        # as the process's umask says; safetensors would let only this user read it
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def relative(path: Path) -> Path:
    """Return the path as a user in this working directory would type it."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def write_whole(path: Path, values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write JSON that must be there; create its folder if it is missing."""
    write_text_whole(path, json.dumps(values, indent=indent) + "\n")


def write_text_whole(path: Path, text: str) -> None:
    """Write a text that is complete, or as it was before; create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_durably(partial, text)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that a crash may have cut.

    It is {} where the file is missing, or not whole.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_in_turn(
    shapes: Mapping[str, "Tensor"],
    read: Callable[[str], "Tensor"],
    path: Path,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write one durable file of safetensors.

    shapes: tensors with the types and shapes of what `read` gives by name. They are written in this
    order, but wide types come first. Raises OSError where it cannot be written: for example, the
    disk is full.
    """
    index: dict[str, Any] = {} if header is None else {"__metadata__": dict(header)}
    places = index_entries(shapes)
    text = json.dumps(index | places).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in places:
                file.write(tensor_bytes(read(name)))
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    sync(path)


def index_entries(shapes: Mapping[str, "Tensor"]) -> dict[str, dict[str, Any]]:
    """Return the index's entry for each tensor, in the order of the data.

    Wide types come first, so that all are aligned.
    """
    places, end = {}, 0
    for name, t in sorted(shapes.items(), key=lambda item: -item[1].itemsize):
        start, end = end, end + t.nbytes
        places[name] = {
            "dtype": SAFETENSORS_DTYPES[str(t.dtype)],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
    return places


def tensor_bytes(tensor: "Tensor") -> memoryview:
    import torch  # here, as lists of runs need no torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


# ---------------------------------------------------------------------- what can be done without

STARS = "*****"
KEY_NAMES = re.compile(  # of environment variables that hold keys; PWD and OLDPWD are folders
    r"(KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|_PWD|CREDENTIALS?)$", re.IGNORECASE
)
SHORTEST_KEY = 8  # characters of a key; a shorter value would also match harmless text
KEY_SHAPES = re.compile(
    r"(?<![\w/])[0-9a-f]{40}(?![\w/])"  # W&B's; within a path it is the name of a snapshot
    r"|wandb_v\d+_\w{20,}|hf_[A-Za-z0-9]{20,}"
)


def try_to_write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON that a run can do without: where it cannot be written, warn and go on.

    For JSON that must be there: `write_whole`.
    """
    text = json.dumps(values, indent=2) + "\n"
    try_to_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def try_to_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file that replaces `path`.

    Where it cannot be written, warn and leave `path` as it was.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            write(partial)
    except OSError as error:
        warn_once(f"{path} is not written: {error.strerror or error}")


def try_to_draw(path: Path, draw: Callable[[Path], object]) -> None:
    """Draw a picture.

    Whatever the drawing raises is one warning, because the checkpoint of the last step is saved
    after it.
    """
    try:
        try_to_write(path, draw)
    except Exception as error:
        warn_once(f"{path} is not drawn: {type(error).__name__}: {error}")


def try_to_append(path: Path, text: str) -> None:
    """Add a text to a file that may not exist yet.

    Where it cannot be written, warn and leave the file as it was.
    """
    size = path.stat().st_size if path.exists() else None
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with suppress(OSError):
            if size is None:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, size)
        warn_once(f"{path} gets no more rows: {error.strerror or error}")


@cache
def warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def redacted(value: Any, variables: Mapping[str, str] = os.environ) -> Any:
    """Return `value` with stars for keys, in texts, lists, mappings and dataclasses.

    Keys are what looks like one of W&B or Hugging Face, and the lines of variables with one of
    KEY_NAMES.
    """
    lines = {
        line.strip()
        for name, text in variables.items()
        if KEY_NAMES.search(name)
        for line in text.splitlines()
    }
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
        starred = {f.name: _starred(getattr(value, f.name), keys) for f in fields(value)}
        return replace(value, **starred)
    return value
