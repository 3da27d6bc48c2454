"""Writes what `--help` and `make list` show. All names are read from the dataclasses."""

from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

from scmoe.config.fields import Config
from scmoe.config.leaves import leaves, plain
from scmoe.config.load import shipped_and_own
from scmoe.config.registry import CALLBACKS

WIDTHS = (27, 22, 11, 54)  # key, type, default, help; 120 characters with two spaces between
FOLDER_TITLES = {"sweep": "Sweeps", "cluster": "Clusters"}  # the others hold configurations
CATALOGUE = {
    "Model families": "model.family",
    "Architectures": "moe.architecture",
    "Routers": "moe.router",
    "Positions": "moe.position",
    "Combining shared and routed experts": "moe.combine",
    "Data sets": "data.name",
    "Optimizers": "optim.name",
}


def help_text() -> str:
    """Return every field with its type, default and meaning, in lines of 120 characters."""
    rows = [("key", "type", "default", "meaning")]
    rows += [(leaf.key, leaf.allowed, plain(leaf.value), leaf.help) for leaf in leaves(Config())]
    return "\n".join(line for row in rows for line in _lines(row))


def catalogue() -> dict[str, list[tuple[str, str]]]:
    """Return what can be chosen: titles, and under each title pairs (how to choose it, what it is).

    A file's first comment says what it is.
    """
    choices = {leaf.key: leaf.choices for leaf in leaves(Config())}
    titles: dict[str, list[tuple[str, str]]] = {"Configurations": [], "Sweeps": [], "Clusters": []}
    for name, path in shipped_and_own().items():
        title = FOLDER_TITLES.get(Path(name).parent.name, "Configurations")
        titles[title].append((name, _first_comment(path)))
    for title, key in CATALOGUE.items():
        titles[title] = [(f"{key}={choice}", "") for choice in choices[key]]
    if CALLBACKS.names():
        titles["Callbacks"] = [(f"callbacks.{name}", "") for name in CALLBACKS.names()]
    return titles


def _lines(row: tuple[str, ...]) -> list[str]:
    """Return a row of the table as lines of text, each cell wrapped in its column."""
    cells = [wrap(cell, width) or [""] for cell, width in zip(row, WIDTHS, strict=True)]
    columns = zip_longest(*cells, fillvalue="")
    return [
        "  ".join(part.ljust(width) for part, width in zip(line, WIDTHS, strict=True)).rstrip()
        for line in columns
    ]


def _first_comment(path: Path) -> str:
    """Return the first line of a file that is a comment, without its sign."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")
