"""The sections of JSON files that tables, benches and `scmoe advise` leave.

A report has `tables`, with the fields of scmoe.report.Report, or `rows`, or `cells`; a report of
several loads has one such report for each. Its pictures are drawn already: NAME.png lies beside
NAME.json, and a table's beside its results.json. docs/results/conditions.json of a checkout says
command, date, machine, reading and pictures of what is kept in its docs.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from scmoe.config.installation import CHECKOUT
from scmoe.config.leaves import ConfigError
from scmoe.files import read_json
from scmoe.predict.row_names import row_in_words
from scmoe.report import Report, say
from scmoe.runs.html_report.cleaner import Cleaner
from scmoe.runs.html_report.section import Section, embedded, flat_table, leaves

READABLE = "a run, a folder of runs, or a JSON file of scmoe table, bench, advise or simulate"
TABLE_KEYS = ("tables", "rows", "cells")
FACTS = ("date", "machine", "commit")
NO_FACTS = ("title", "paper", "loads", "pictures", "command", "reading", "note", *TABLE_KEYS)


def sections_of_file(path: Path, named: bool, clean: Cleaner) -> list[Section]:
    """Return a section for each report in a JSON file: of several loads there are several.

    named: raise ConfigError if the file has none, or a damaged one; otherwise they are left out.
    """
    try:
        data = clean(read_report(path))
    except (OSError, ValueError, RecursionError) as error:
        if named:
            raise ConfigError(f"{path} is no JSON file: {error}. Name {READABLE}.") from error
        return []

    reports = reports_in(data)
    if named and not reports:
        content = f"a {type(data).__name__}"
        if isinstance(data, dict):
            content = f"the keys {', '.join(data)[:80]}"
        raise ConfigError(f"{path} is not recognised: it holds {content}. Name {READABLE}.")

    said = clean(conditions_of(path))
    try:
        sections = [section_of(path, report, said | data) for report in reports]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        damage = f"{path} has a damaged table ({type(error).__name__}: {error})"
        if named:
            raise ConfigError(f"{damage}. Write it again, or leave it out.") from error
        say(f"{damage}: it is left out")
        return []
    for section in sections[:1]:
        section.pictures = embedded(pictures_of(path, said | data))
    return sections


def read_report(path: Path) -> Any:
    """Return the JSON of a file, or of its last line, since verbs end with such a line."""
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("it is empty")
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text.strip().splitlines()[-1])


def reports_in(data: Any) -> list[dict[str, Any]]:
    """Return the reports in a file, with names of rows in words. Stated tables have readable names
    already."""
    loads = data.get("loads") if isinstance(data, dict) else None
    parts = [data, *(loads if isinstance(loads, list) else [])]
    return [
        part if "tables" in part else in_words(part, part.get("every", 2))
        for part in parts
        if isinstance(part, dict) and any(is_table(part.get(key)) for key in TABLE_KEYS)
    ]


def is_table(value: Any) -> bool:
    """Return whether a value is a mapping of mappings, or a list of mappings."""
    rows = [*value.values()] if isinstance(value, dict) else value
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def in_words(value: Any, every: int) -> Any:
    """Return a value in which names of rows, at any depth, are in words."""
    if isinstance(value, str):
        return row_in_words(value, every)
    if isinstance(value, list):
        return [in_words(part, every) for part in value]
    if isinstance(value, dict):
        return {row_in_words(key, every): in_words(part, every) for key, part in value.items()}
    return value


def section_of(path: Path, report: Mapping[str, Any], said: Mapping[str, Any]) -> Section:
    """Return the section of a report. said: what is said of its file."""
    load = report.get("load")
    title = str(report.get("title") or name_of(path))
    if isinstance(load, dict) and "name" in load:
        title += f": load {load['name']}"
    section = Section(title, "", level=3, tables=[*tables_of(report)])
    for table in section.tables:
        table.cells()  # an error of a damaged table comes here, not in the template

    facts = {key: said[key] for key in FACTS if key in said}
    facts |= {key: value for key, value in report.items() if key not in NO_FACTS}
    section.facts = leaves(facts)
    section.commands = [str(said[key]) for key in ("command",) if key in said]
    section.paragraphs = [plain(str(said[key])) for key in ("reading", "note") if key in said]
    return section


def name_of(path: Path) -> str:
    """Return the name of a result: of a table's results.json that of its folder."""
    return path.parent.name if path.stem == "results" else path.stem


def plain(markdown: str) -> str:
    """Return a sentence of Markdown without its links and marks; a note follows a comma."""
    return re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)).lstrip(", ")


def tables_of(report: Mapping[str, Any]) -> Iterator[Report]:
    """Yield the tables that a report states; without any, one table: of its rows, with the paper's
    values, or of its cells."""
    if "tables" in report:
        for table in report["tables"]:
            for form in table["columns"].values():
                refuse_form(form)
            yield Report(**table)
    elif "rows" in report:
        paper, rows = report.get("paper") or {}, report["rows"]
        by_name = rows if isinstance(rows, dict) else {row["name"]: row for row in rows}
        more = {name: {"paper": paper[name]} if name in paper else {} for name in by_name}
        nameless = {"name": None}  # it is the row's heading
        yield flat_table({name: row | more[name] | nameless for name, row in by_name.items()})
    else:
        yield flat_table({str(i): cell for i, cell in enumerate(report["cells"], 1)}, "cell")


def refuse_form(form: str) -> None:
    """Raise ValueError if the format of a cell does more than to pick a value and round it."""
    for _, name, spec, _ in Formatter().parse(form):
        picks_attribute = "." in re.sub(r"\[[^\]]*\]", "", name or "")
        if picks_attribute or re.search(r"[{}]|\d{3}", spec or ""):
            raise ValueError(f"the format {form!r} does more than to round a value")


def docs() -> Path:
    """Return the folder of a checkout's docs; an installation has none."""
    return CHECKOUT / "docs"


def conditions_of(path: Path) -> dict[str, Any]:
    """Return what a checkout's docs/results/conditions.json says of a report of its docs."""
    if docs() not in path.resolve().parents:
        return {}
    said = read_json(docs() / "results" / "conditions.json").get(name_of(path))
    return said if isinstance(said, dict) else {}


def pictures_of(path: Path, said: Mapping[str, Any]) -> dict[Path, str]:
    """Return the caption of each picture of a report by file. said: it may name the pictures of a
    result of the docs."""
    if isinstance(stated := said.get("pictures"), dict):
        return {docs() / "figures" / f"{name}.png": str(words) for name, words in stated.items()}
    beside = [*path.parent.glob("*.png")] if path.stem == "results" else [path.with_suffix(".png")]
    return {file: file.stem.replace("_", " ") for file in sorted(beside) if file.is_file()}


def named_results() -> dict[str, Path]:
    """Return the results of a checkout's docs by name; a folder in docs/figures is one of several
    reports."""
    results = {path.stem: path for path in (docs() / "figures").glob("*.json")}
    results |= {path.name: path for path in (docs() / "figures").glob("*/")}
    results |= {path.stem: path for path in (docs() / "results").glob("*.json")}
    results |= {path.parent.name: path for path in (docs() / "results").glob("*/results.json")}
    results.pop("conditions", None)
    return results
