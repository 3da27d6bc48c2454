"""A table's file: its rows with the paper's values, and the scales at which it can be run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmoe.config.fields import ConfigError
from scmoe.config.load import parse_yaml

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
    name: str
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
    source = str(path)
    tree = _mapping(parse_yaml(path.read_text(encoding="utf-8"), source), source, "the file")
    _keys(tree, source, "the file", "title", "metric", "unit", "baseline", "scales", "rows")
    rows = tuple(_row(entry, source) for entry in tree["rows"])
    if len({row.slug for row in rows}) < len(rows):
        raise ConfigError(f"{source}: rows have the same name, allowed: names that differ in letters or digits")
    by_name = {row.name: row for row in rows}
    if tree["baseline"] not in by_name:
        raise ConfigError(f"{source}: baseline is {tree['baseline']!r}, allowed: {', '.join(map(repr, by_name))}")
    scales = _mapping(tree["scales"], source, "scales")
    made = {scale: _scale(scale, entry, path) for scale, entry in scales.items()}
    return Table(name, tree["title"], tree["metric"], tree["unit"], by_name[tree["baseline"]], rows, made)


def _row(entry: Any, source: str) -> Row:
    _keys(_mapping(entry, source, "a row"), source, "a row", "name", "groups", "paper", "overrides")
    overrides = _mapping(entry["overrides"], source, f"overrides of {entry['name']}")
    words = tuple(f"{key}={value}" for key, value in overrides.items())
    return Row(entry["name"], tuple(entry["groups"]), _number(float, entry["paper"], source, "paper"), words)


def _scale(name: str, entry: Any, path: Path) -> Scale:
    what = f"scales.{name}"
    _keys(_mapping(entry, str(path), what), str(path), what, "config", "seeds", "jobs")
    jobs = None if entry["jobs"] == "launch" else _number(int, entry["jobs"], str(path), f"{what}.jobs")
    seeds = _number(int, entry["seeds"], str(path), f"{what}.seeds")
    if seeds < 1 or (jobs is not None and jobs < 0):
        raise ConfigError(f"{path}: {what} has {seeds} seeds and {jobs} jobs, allowed: 1 or more, 0 or more | launch")
    return Scale(name, path.parent / entry["config"], seeds, jobs)


def _mapping(value: Any, source: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {what} is {value!r}, allowed: a mapping of keys to values")
    return value


def _keys(mapping: dict[str, Any], source: str, what: str, *wanted: str) -> None:
    if set(mapping) != set(wanted):
        raise ConfigError(f"{source}: {what} has the keys {', '.join(mapping)}; allowed: {', '.join(wanted)}")


def _number(kind: type, text: Any, source: str, what: str) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {what} is {text!r}, allowed: {kind.__name__}") from error
