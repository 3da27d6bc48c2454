"""Caches tokens: every split is one flat array of ids on disk, built once for a text and a tokenizer.

    cache_dir/<name>-<hash>/  tokenizer.json  train.bin  val.bin  test.bin  header.json

A `.bin` is raw uint16 (uint32 for more than 65,536 ids), little-endian, every document followed by the end of text. The
hash covers the texts, the tokenizer's settings and `VERSION`, so another text or tokenizer has another folder, and a
complete folder is a correct one. It is built under a temporary name and renamed, so readers never see a part of it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from scmoe.datamodules.sources import SPLITS, Source
from scmoe.datamodules.tokenizer import Tokenizer, make_tokenizer, pieces, tokenizer_file

VERSION = 1  # increase it when equal texts and settings give different tokens


@dataclass(frozen=True)
class TokenFile:
    """A flat array of `length` ids on disk; slices are numpy arrays. Each process maps the file at its first read."""

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


@dataclass(frozen=True)
class TokenCache:
    """An opened cache folder. `num_bytes[split]` counts the UTF-8 bytes of its texts; `content` is the full hash."""

    folder: Path
    content: str
    tokenizer: Tokenizer
    tokens: dict[str, TokenFile]
    num_bytes: dict[str, int]


def content_hash(source: Source, tokenizer: str, vocab_size: int) -> str:
    """Returns the hash that names a cache. Of a tokenizer's file it covers the content, not the path."""
    if tokenizer not in ("bpe", "gpt2"):
        tokenizer = hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()
    # Only a trained tokenizer depends on vocab_size; for others it is a limit that is checked when a cache is opened.
    settings = [VERSION, source.content, tokenizer, vocab_size if tokenizer == "bpe" else None]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def build_cache(cache_dir: Path, name: str, source: Source, tokenizer: str, vocab_size: int) -> Path:
    """Returns the cache's folder, and builds it where it is missing or damaged."""
    content = content_hash(source, tokenizer, vocab_size)
    folder = cache_folder(cache_dir, name, content)
    if is_whole(folder):
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    # In cache_dir, not in /tmp, as a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache_dir) as building:
        fresh = Path(building) / "fresh"
        fresh.mkdir()
        _write(fresh, content, source, tokenizer, vocab_size)
        if not is_whole(folder):
            with suppress(FileNotFoundError):  # it does not exist, or another process has just moved it
                os.rename(folder, Path(building) / "damaged")
        try:
            os.rename(fresh, folder)
        except OSError:
            if not is_whole(folder):  # otherwise another process was first, and its cache is equal
                raise
    return folder


def open_cache(folder: Path) -> TokenCache:
    """Opens a complete cache. Raises FileNotFoundError where there is none."""
    if not is_whole(folder):
        raise FileNotFoundError(f"{folder} is not a complete token cache: call prepare_data() first")
    header = json.loads((folder / "header.json").read_text())
    dtype, counts = header["dtype"], {split: header["splits"][split] for split in SPLITS}
    tokens = {split: TokenFile(folder / f"{split}.bin", dtype, count["tokens"]) for split, count in counts.items()}
    num_bytes = {split: count["bytes"] for split, count in counts.items()}
    return TokenCache(folder, header["content"], Tokenizer.load(folder / "tokenizer.json"), tokens, num_bytes)


def cache_folder(cache_dir: Path, name: str, content: str) -> Path:
    return cache_dir / f"{name}-{content[:16]}"


def is_whole(folder: Path) -> bool:
    """Returns whether every file exists with the size that the header states. The header is written last."""
    try:
        files = json.loads((folder / "header.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, KeyError):
        return False


def _write(folder: Path, content: str, source: Source, kind: str, vocab_size: int) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:  # which shows no bars
        console.print("preparing data: text is read and cut into tokens, once for this text", soft_wrap=True)
    train_texts = source.documents["train"]
    if kind == "bpe":
        train_texts = track(train_texts, "reading text for BPE", console=console, transient=True)
    tokenizer = make_tokenizer(kind, vocab_size, train_texts)
    tokenizer.save(folder / "tokenizer.json")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with Progress(console=console, transient=True) as progress:
        splits = {
            split: _write_split(folder / f"{split}.bin", source.documents[split], tokenizer, dtype, progress)
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
    (folder / "header.json").write_text(json.dumps(header, indent=2) + "\n")


def _write_split(
    path: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: str, progress: Progress
) -> dict[str, int]:
    """Writes one split and returns its counts. Raises ValueError where the tokens do not add up to the text's bytes."""
    num_tokens = num_bytes = decoded_bytes = 0
    token_bytes_V = tokenizer.token_bytes()
    end = np.array([tokenizer.end_of_text], dtype)
    with path.open("wb") as file:
        for document in progress.track(documents, description=f"tokenizing {path.stem}"):
            for piece in pieces(document):
                ids = tokenizer.encode(piece)
                ids.astype(dtype).tofile(file)
                num_tokens += len(ids)
                num_bytes += len(piece.encode())
                decoded_bytes += int(token_bytes_V[ids].sum())
            end.tofile(file)
            num_tokens += 1
    if decoded_bytes != num_bytes:
        raise ValueError(
            f"the tokenizer turns {num_bytes} bytes of {path.stem} text into {decoded_bytes}: bits per byte would be "
            "wrong; data.tokenizer must be a byte-level BPE without normalizer and prefix space, or like LLaMA's"
        )
    return {"tokens": num_tokens, "bytes": num_bytes}
