"""A cache of a text's tokens, built once for each tokenizer.

    cache_dir/<name>-<hash>/  tokenizer.json  train.bin  val.bin  test.bin  header.json

A `.bin` is raw uint16 (uint32 for more than 65,536 ids), little-endian, every document followed by
the end of text. The hash covers the texts, the tokenizer's settings and `VERSION`, so another text
or tokenizer has another folder, and a complete folder is a correct one. It is built under a
temporary name and renamed, so readers never see a part of it.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from scmoe.datamodules.documents import SPLITS, Documents
from scmoe.datamodules.tokenizer import PIECE_CHARS, Tokenizer, make_tokenizer, pieces

VERSION = 1  # increase it when equal texts and settings give different tokens


@dataclass(frozen=True)
class TokenFile:
    """A flat array of `length` ids on disk. Slices are numpy arrays.

    Each process maps the file at its first read.
    """

    path: Path
    dtype: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        return mapped(self)[part]


@cache  # here and not on the object, since pickling a map copies the whole file
def mapped(file: TokenFile) -> np.memmap:
    return np.memmap(file.path, dtype=file.dtype, mode="r", shape=(file.length,))


def build_cache(
    folder: Path, content: str, source: Documents, tokenizer: str, vocab_size: int
) -> None:
    """Build a cache unless there is a complete one."""
    if is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".building-{this_machine()}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        remove_if_dead(leftover)
    # Beside the folder, not in /tmp, as a rename is atomic only within one file system.
    prefix += f"{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as building:
        fresh = Path(building) / "fresh"
        fresh.mkdir()
        _write(fresh, content, source, tokenizer, vocab_size)
        if not is_complete(folder):
            # The folder does not exist, or another process has just moved it.
            with suppress(FileNotFoundError):
                os.rename(folder, Path(building) / "damaged")
        try:
            os.rename(fresh, folder)
        except OSError:
            if not is_complete(folder):  # else another process was first, and its cache is equal
                raise


def remove_if_dead(building: Path) -> None:
    """Remove a temporary folder of this machine if its process, whose number is in the name, was
    killed."""
    with suppress(PermissionError):  # the process is another user's
        try:
            os.kill(int(building.name.split("-")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(building, ignore_errors=True)


def this_machine() -> str:
    """Return a name for this host and its namespace of process ids: a container has its own ids,
    perhaps under the host's name."""
    ids = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{ids.stat().st_ino if ids.exists() else 0}"


def is_complete(folder: Path) -> bool:
    """Return whether every file exists with the size that the header states. The header is written
    last."""
    try:
        files = json.loads((folder / "header.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (
        FileNotFoundError,
        NotADirectoryError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
    ):
        return False


def _write(folder: Path, content: str, source: Documents, kind: str, vocab_size: int) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:  # it shows no bars
        console.print(
            "preparing data: text is read and cut into tokens, once for this text", soft_wrap=True
        )
    train_texts = source.documents["train"]
    if kind == "bpe":
        train_texts = track(train_texts, "reading text for BPE", console=console, transient=True)
    tokenizer = make_tokenizer(kind, vocab_size, train_texts)
    tokenizer.save(folder / "tokenizer.json")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with Progress(console=console, transient=True) as progress:
        splits = {
            split: _write_split(
                folder / f"{split}.bin", source.documents[split], tokenizer, dtype, progress
            )
            for split in SPLITS
        }
    names = ["tokenizer.json", *(f"{split}.bin" for split in SPLITS)]
    header = {
        "version": VERSION,
        "content": content,
        "tokenizer": kind if kind in ("bpe", "gpt2") else "file",
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "splits": splits,
        "files": {name: (folder / name).stat().st_size for name in names},
    }
    (folder / "header.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _write_split(
    path: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: str, progress: Progress
) -> dict[str, int]:
    """Write one split and return its counts.

    Raises ValueError if the tokens do not add up to the text's bytes, or if decoding the tokens of
    the first PIECE_CHARS characters does not give the text back.
    """
    num_tokens = 0
    num_bytes = 0
    decoded_bytes = 0
    token_bytes_V = tokenizer.token_bytes()
    end = np.array([tokenizer.end_of_text], dtype)
    lossless = (
        "data.tokenizer must be a byte-level BPE without normalizer and prefix space, or like"
        " LLaMA's"
    )
    with path.open("wb") as file:
        for document in progress.track(documents, description=f"tokenizing {path.stem}"):
            for piece in pieces(document):
                ids = tokenizer.encode(piece)
                if num_bytes < PIECE_CHARS and tokenizer.decode(ids) != piece:
                    raise ValueError(
                        f"the tokenizer changes the {path.stem} text, such as its capitals;"
                        f" {lossless}"
                    )
                ids.astype(dtype).tofile(file)
                num_tokens += len(ids)
                num_bytes += len(piece.encode())
                decoded_bytes += int(token_bytes_V[ids].sum())
            end.tofile(file)
            num_tokens += 1
    if decoded_bytes != num_bytes:
        raise ValueError(
            f"the tokenizer turns {num_bytes} bytes of {path.stem} text into {decoded_bytes}: bits"
            f" per byte would be wrong; {lossless}"
        )
    return {"tokens": num_tokens, "bytes": num_bytes}
