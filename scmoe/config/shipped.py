"""Finds configurations by name: in a folder (the current one) first, then among those that come with scmoe.

    quickstart, quickstart.yaml, configs/quickstart.yaml, experiment/table3/small

In a checkout scmoe/configs is a link to configs/; in an installed package it is a folder.
"""

import os
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "configs"


def find(name: str | Path, folder: Path = Path()) -> Path:
    """Return the file of a configuration. If there is none, return folder / name, so that reading it is the error."""
    name = str(name)
    for path in (folder / name, folder / "configs" / name, SHIPPED / name.removeprefix("configs/")):
        for file in (str(path), f"{path}.yaml"):
            if os.path.isfile(file):  # no error for a name that no file can have
                return Path(file)
    return folder / name


def shipped_and_own() -> dict[str, Path]:
    """Return all configurations that `find` finds by name from the current folder: configs/quickstart.yaml, ..."""
    roots = (SHIPPED, Path("configs"))
    found = {f"configs/{file.relative_to(root)}": file for root in roots for file in root.rglob("*.yaml")}
    return dict(sorted(found.items()))
