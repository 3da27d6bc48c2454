"""A section of the page, as the template shows it, and how values and pictures stand in it."""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scmoe.files import warn_once
from scmoe.report import Report, in_one_line

PNG = b"\x89PNG"
DEPTH = 2  # of the values of a tree that are shown
LONGEST_LIST = 4  # values that are shown as one


@dataclass(frozen=True)
class Picture:
    """A picture of the page. address: its bytes as a `data:` URL."""

    caption: str
    address: str


@dataclass
class Section:
    """A heading with what stands below it. facts: name and value. level: of the heading. links: an
    anchor for each row of the tables. text: shown as it is, folded."""

    title: str
    anchor: str
    level: int = 2
    in_contents: bool = True
    facts: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Report] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    text: str = ""
    text_title: str = ""


def embedded(pictures: Mapping[Path, str]) -> list[Picture]:
    """Return pictures, given as words by file, for the page. A file that is no PNG is left out, and
    a line on standard error names it."""
    shown = []
    for path, words in pictures.items():
        try:
            content = path.read_bytes()
        except OSError as error:
            warn_once(f"{path} is left out, as it cannot be read: {error}")
            continue
        if content.startswith(PNG):
            shown.append(Picture(words, f"data:image/png;base64,{b64encode(content).decode()}"))
        else:
            warn_once(f"{path} is left out, as it is no PNG")
    return shown


def flat_table(rows: Mapping[str, Mapping[str, Any]], first: str = "row") -> Report:
    """Return a table with a column for each value of the rows."""
    flat = {name: dict(leaves(row)) for name, row in rows.items()}
    headings = dict.fromkeys(key for row in flat.values() for key in row)
    keys = {heading: f"column{i}" for i, heading in enumerate(headings)}
    cells = {
        name: {key: row.get(heading, "") for heading, key in keys.items()}
        for name, row in flat.items()
    }
    return Report("", cells, {heading: f"{{{key}}}" for heading, key in keys.items()}, first)


def leaves(tree: Mapping[str, Any], before: str = "", depth: int = DEPTH) -> list[tuple[str, str]]:
    """Return keys and values of a tree in words, down to DEPTH; a short list is one value."""
    pairs = []
    for key, value in tree.items():
        words = before + str(key).replace("_", " ")
        if isinstance(value, dict):
            pairs += leaves(value, f"{words}, ", depth - 1) if depth > 1 else []
        elif not isinstance(value, list) or is_short(value):
            pairs.append((words, number(value)))
    return [(words, text) for words, text in pairs if text]


def is_short(values: Sequence[Any]) -> bool:
    return len(values) <= LONGEST_LIST and not any(isinstance(one, list | dict) for one in values)


def number(value: Any) -> str:
    """Return a number for a reader: large ones with commas, others with four digits; "" for
    None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float) and (value.is_integer() or abs(value) >= 1000):
        value = round(value)
    return f"{value:,}" if isinstance(value, int) else in_one_line(value)
