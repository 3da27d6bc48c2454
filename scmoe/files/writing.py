"""Writes files that survive a crash: a file is complete and on the disk, or as it was before.

Safetensors files are written one tensor after another, so that memory holds one of them. Such a file is the length of
its index in 8 bytes, the index in JSON, padded with spaces so that the data is aligned, and the tensors' bytes without
gaps.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {  # of torch: as safetensors calls them
    **{"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"},
    **{"torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8"},
    "torch.bool": "BOOL",
}


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


def write_in_turn(
    shapes: Mapping[str, "Tensor"], read: Callable[[str], "Tensor"], path: Path, header: Mapping[str, str] | None = None
) -> None:
    """Write one durable file. shapes: tensors with the types and shapes of what `read` gives by name; in their order,
    but for wide types, which come first. Raises OSError where it cannot be written: for example, the disk is full."""
    index: dict[str, Any] = {} if header is None else {"__metadata__": dict(header)}
    places = places_of(shapes)
    text = json.dumps(index | places).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in places:
                file.write(bytes_of(read(name)))
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    sync(path)


def places_of(shapes: Mapping[str, "Tensor"]) -> dict[str, dict[str, Any]]:
    """Return the index's entry for each tensor, in the order of the data: wide types first, to be aligned."""
    places, end = {}, 0
    for name, t in sorted(shapes.items(), key=lambda item: -item[1].itemsize):
        start, end = end, end + t.nbytes
        places[name] = {"dtype": DTYPES[str(t.dtype)], "shape": list(t.shape), "data_offsets": [start, end]}
    return places


def bytes_of(tensor: "Tensor") -> memoryview:
    import torch  # here, as lists of runs need no torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
