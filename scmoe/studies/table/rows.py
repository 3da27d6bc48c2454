"""A table's file: its rows with the paper's values, and the scales at which it can be run."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmoe.config.fields import ConfigError
from scmoe.config.load import parse_yaml
from scmoe.studies.checks import LIST, MAPPING, TEXT, Rule, check, refusal

FOLDER = Path("configs/experiment")


@dataclass(frozen=True)
class Row:
    name: str
    groups: tuple[str, ...]  # parts of the table that show it
    paper: float
    overrides: tuple[str, ...]  # key=value, on the config of the scale

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Scale:
    config: Path
    seeds: int  # 1 to this
    jobs: int | None  # runs in parallel; 0: all in one process; None: launch files only


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    metric: str  # of a run's summary
    unit: str
    baseline: Row
    rows: tuple[Row, ...]
    scales: dict[str, Scale]


def load_table(name: str, root: Path = FOLDER) -> Table:
    """Read the table of <root>/<name>/table.yaml. Raises ConfigError, in one line, for what cannot be read."""
    path = root / name / "table.yaml"
    if not path.is_file():
        there = ", ".join(sorted(found.parent.name for found in root.glob("*/table.yaml")))
        raise ConfigError(f"table is {name!r}, allowed: {there}")
    try:
        return _table(name, path.parent, parse_yaml(path.read_text(encoding="utf-8"), "the file"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _table(name: str, folder: Path, tree: Any) -> Table:
    check("", tree, TABLE, TABLE)
    rows = {}
    for entry in tree["rows"]:
        check("a row", entry, ROW, ROW)
        words = tuple(f"{key}={value}" for key, value in entry["overrides"].items())
        rows[entry["name"]] = Row(entry["name"], tuple(entry["groups"]), float(entry["paper"]), words)
    if len({row.slug for row in rows.values()}) < len(tree["rows"]):
        raise ConfigError("rows have the same name, allowed: names that differ in letters or digits")
    if tree["baseline"] not in rows:
        raise refusal("baseline", tree["baseline"], ", ".join(map(repr, rows)))
    scales = {}
    for scale, entry in tree["scales"].items():
        check(f"scales.{scale}", entry, SCALE, SCALE)
        jobs = None if entry["jobs"] == "launch" else int(entry["jobs"])
        scales[scale] = Scale(folder / entry["config"], int(entry["seeds"]), jobs)
    title, metric, unit = tree["title"], tree["metric"], tree["unit"]
    return Table(name, title, metric, unit, rows[tree["baseline"]], tuple(rows.values()), scales)


def _is_float(text: Any) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


# parse_yaml gives texts
TABLE = {**dict.fromkeys(("title", "metric", "unit", "baseline"), TEXT), "scales": MAPPING, "rows": LIST}
ROW: dict[str, Rule] = {
    "name": TEXT,
    "groups": LIST,
    "paper": (_is_float, "a number, such as 3.27"),
    "overrides": (lambda value: isinstance(value, dict), "a mapping of keys to values"),
}
SCALE: dict[str, Rule] = {
    "config": TEXT,
    "seeds": (lambda text: str(text).isdecimal() and int(text) > 0, "1 or more"),
    "jobs": (lambda text: text == "launch" or str(text).isdecimal(), "0 or more | launch"),
}
