"""Finds the `make` that a command line names.

FILE.py:NAME       a function of the user's own file
pair:FILE.py:NAME  a dispatch and a combine
hf:NAME            expert parallelism of transformers
hf:FILE.py:NAME    one that this file registers
"""

import importlib
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError
from scmoe.conform import of_transformers, pair
from scmoe.conform.adapter import Make

TRANSFORMERS = "hf:"
PAIR_PREFIX = "pair:"


def check_source(source: str) -> None:
    """Raise ConfigError if `source` names no layer. A file that it names is imported by the ranks
    only."""
    file, colon, name = _named(source).rpartition(":")
    if source.startswith(TRANSFORMERS):
        require("conform", "transformers")
    if (colon or not source.startswith(TRANSFORMERS)) and not (Path(file).is_file() and name):
        raise ConfigError(
            f"{source!r} names no layer. Give FILE.py:NAME, where NAME is the function that makes"
            " an Adapter, pair:FILE.py:NAME for a dispatch and a combine, or hf:NAME for"
            " transformers."
        )


def libraries_of(source: str) -> list[str]:
    """Return modules that take long to import and that every rank needs."""
    heavy = ["transformers.modeling_utils", "transformers.models.olmoe.modeling_olmoe"]
    return heavy if source.startswith(TRANSFORMERS) else []


@cache
def make_of(source: str) -> Make:
    """Return the function that makes the layer. Raises ConfigError if the file has none."""
    file, _, name = _named(source).rpartition(":")
    functions = _imported(Path(file)) if file else {}
    if source.startswith(TRANSFORMERS):
        return partial(of_transformers.make, name)
    if name not in functions:
        raise ConfigError(f"{file} has no {name}. Name the function that makes the layer.")
    function = functions[name]
    return partial(pair.make, function) if source.startswith(PAIR_PREFIX) else function


def _named(source: str) -> str:
    return source.removeprefix(TRANSFORMERS).removeprefix(PAIR_PREFIX)


def _imported(path: Path) -> dict[str, Any]:
    """Return the names of a file, imported as a module whose folder is on Python's path."""
    path = path.resolve()
    earlier = sys.modules.get(path.stem)
    is_other = earlier is not None and getattr(earlier, "__file__", None) != str(path)
    if is_other or "." in path.stem:
        raise ConfigError(
            f"{path} cannot be imported as {path.stem}: another module has this name, or the name"
            " has a dot. Rename the file."
        )
    sys.path.insert(0, str(path.parent))
    return vars(importlib.import_module(path.stem))
