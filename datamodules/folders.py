"""Walks a folder and the folders to which links below it lead."""

import os
from collections.abc import Iterator
from pathlib import Path


def walk_once(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder as os.walk does, links to folders too, but each folder once: under its own name
    where that is below `folder`, else under a link."""
    seen = set[str]()
    starts = [os.fspath(folder)]
    for start in starts:  # links are appended, so they come after all real folders
        for here, folders, names in os.walk(start):
            real = os.path.realpath(here)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            yield here, folders, names
            paths = (os.path.join(here, name) for name in folders)
            starts += [path for path in paths if os.path.islink(path)]
