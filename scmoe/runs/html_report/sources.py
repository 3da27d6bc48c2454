"""What a report is made from: the files that the command line names, read and recognised.

    run            a directory with config.yaml
    table          results.json of `scmoe table`
    speeds         a report of `scmoe bench overlap`, also one of several loads
    training       a report of `scmoe bench train`
    advice         what `scmoe advise` has printed, kept in a file
    trace          a Chrome trace whose operators are named scmoe/<name>
    measurements   any other JSON object with rows, cells or tables

Every text passes `clean`: keys and names of machines do not reach the page.
"""

import gzip
import json
import platform
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scmoe.config.extras import CHECKOUT
from scmoe.config.leaves import ConfigError
from scmoe.files import STARS, read_json, redacted
from scmoe.predict.row_names import row_in_words
from scmoe.runs.seen import SeenRun, find_runs, readable

RUNS = Path("runs")
KINDS = (
    "a run, a folder of runs, or a JSON file of scmoe table, bench, advise or simulate, or a Chrome"
    " trace"
)
COMMIT = 9  # letters of a commit that are shown; all 40 look like a key
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # XML has none of them
ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<=://)[^/\s@]+@")  # IPv4, or user:password@


@dataclass(frozen=True)
class Source:
    """A recognised file. name: as the page calls it. conditions: command, date, machine. named: on
    the command line; others were found in a folder."""

    kind: str
    name: str
    path: Path
    data: dict[str, Any]
    conditions: dict[str, str] = field(default_factory=dict)
    named: bool = False


@dataclass
class Sources:
    runs: list[SeenRun] = field(default_factory=list)
    files: list[Source] = field(default_factory=list)
    skipped: int = 0  # JSON files of searched folders that are none of the kinds

    def of_kind(self, kind: str) -> list[Source]:
        return [source for source in self.files if source.kind == kind]


class Cleaner:
    """Removes from texts what must not reach a page that is handed on.

    These are keys (`redacted`), names of machines, IPv4 addresses, and characters that XML does not
    allow. hosts: the names of machines.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        names = sorted({re.escape(host) for host in hosts if host}, key=len, reverse=True)
        # a trace is named HOST_PID.TIME.pt.trace.json
        pattern = rf"(?<![A-Za-z0-9.-])(?:{'|'.join(names)})(?:\.[\w-]+)*(?![A-Za-z0-9-])"
        self.hosts = re.compile(pattern, re.IGNORECASE) if names else None

    def __call__(self, value: Any) -> Any:
        """Return the value with stars and without control characters, in texts at any depth."""
        if isinstance(value, str):
            text = CONTROL.sub("\ufffd", ADDRESS.sub(STARS, redacted(value)))
            return self.hosts.sub(STARS, text) if self.hosts else text
        if isinstance(value, list | tuple):
            return [self(part) for part in value]
        if isinstance(value, dict):
            return {
                self(str(key)): self(shortened(part) if "git_commit" in str(key) else part)
                for key, part in value.items()
            }
        return value


def shortened(commits: Any) -> Any:
    """Return a commit, or a list of them, with the letters that are shown."""
    if isinstance(commits, list):
        return [str(commit)[:COMMIT] for commit in commits]
    return str(commits)[:COMMIT] if commits else commits


def cleaner_for(runs: Sequence[SeenRun]) -> Cleaner:
    """Return a cleaner that knows this machine's name, and those in the runs' state.json."""
    hosts = [platform.node(), platform.node().partition(".")[0]]
    for run in runs:
        host = read_json(run.path / "state.json").get("host")
        hosts += [host, host.partition(".")[0]] if isinstance(host, str) else []
    return Cleaner(hosts)


def find_sources(names: Sequence[str], last: int) -> tuple[Sources, Cleaner]:
    """Return what the names of a command line lead to, and what cleans texts of it.

    names: runs, folders, files, or names below runs/ and, in a checkout, of results; none: the
    folder runs. last: how many of the newest runs of a folder are shown. Raises ConfigError.
    """
    sources = Sources()
    paths = [located(name) for name in names] or [path for path in (RUNS,) if path.is_dir()]
    for path in paths:
        if path.is_file():
            sources.files += read_file(path, must=True)
        elif (path / "config.yaml").exists():
            sources.runs.append(SeenRun(path))
        else:
            search(path, sources, last)
    by_path = {run.path.resolve(): SeenRun(run.path.resolve()) for run in sources.runs}
    whole = readable(by_path.values())
    sources.runs = sorted(whole, key=lambda run: run.begun, reverse=True)

    if not sources.runs and not sources.files:
        where = " and ".join(names) or f"the folder {RUNS}/"
        raise ConfigError(
            f"There is nothing to report in {where}. Train a run first, or name {KINDS}."
        )
    clean = cleaner_for(sources.runs)
    sources.files = [
        replace(s, name=clean(s.name), data=clean(s.data), conditions=clean(s.conditions))
        for s in sources.files
    ]
    return sources, clean


def located(name: str) -> Path:
    """Return the file or folder that a word of the command line names. Raises ConfigError."""
    results = named_results()
    for path in (Path(name), RUNS / name):
        if path.exists():
            return path
    if name in results:
        return results[name]
    shown = sorted(
        word for word, path in results.items() if path.is_dir() or read_file(path, False)
    )
    alike = get_close_matches(name, shown, n=5, cutoff=0.5) or shown
    names = f", or a result: {', '.join(alike)}" if alike else ""
    raise ConfigError(f"There is no {name!r}. Name {KINDS}{names}.")


def named_results() -> dict[str, Path]:
    """Return the results of a checkout's docs by name; a folder in docs/figures is one of several
    reports."""
    docs = CHECKOUT.parent / "docs"
    results = {path.stem: path for path in (docs / "figures").glob("*.json")}
    results |= {path.name: path for path in (docs / "figures").glob("*/")}
    results |= {path.stem: path for path in (docs / "results").glob("*.json")}
    results |= {path.parent.name: path for path in (docs / "results").glob("*/results.json")}
    results.pop("conditions", None)
    return results


def search(folder: Path, sources: Sources, last: int) -> None:
    """Add the newest runs of a folder, and every recognised JSON file that is in no run."""
    runs = find_runs(folder)
    sources.runs += runs[:last]
    of_runs = {run.path for run in runs}
    for path in sorted(folder.rglob("*.json")):
        if not of_runs & {*path.parents} and path.is_file():
            recognised = read_file(path, must=False)
            sources.files += recognised
            sources.skipped += not recognised


def read_file(path: Path, must: bool) -> list[Source]:
    """Return what a JSON file holds; several sources where it reports several loads.

    The last line alone counts where the whole file is no JSON, since verbs end with such a line.
    must: raise ConfigError if the file is none of the kinds; otherwise return [].
    """
    try:
        data = json_of(path)
    except (OSError, ValueError, EOFError, zlib.error, RecursionError) as error:
        if must:
            raise ConfigError(f"{path} is no JSON file: {error}. Name {KINDS}.") from error
        return []

    loads = data.get("loads") if isinstance(data, dict) else None
    reports = loads if isinstance(loads, list) else [data]
    kinds = [kind_of(report) for report in reports]
    if kinds and all(kinds):
        said = conditions_of(path)
        return [
            Source(
                kind,
                name_of(path, report),
                path,
                data_of(kind, report),
                said | stated(report),
                named=must,
            )
            for kind, report in zip(kinds, reports, strict=True)
        ]
    if must:
        content = f"a {type(data).__name__}"
        if isinstance(data, dict):
            content = f"the keys {', '.join(map(str, data))[:80]}"
        raise ConfigError(f"{path} is not recognised: it holds {content}. Name {KINDS}.")
    return []


def json_of(path: Path) -> Any:
    """Return the JSON of a file, or of its last line."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if not text.strip():
        raise ValueError("it is empty")
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text.strip().splitlines()[-1])


def kind_of(data: Any) -> str:
    """Return the kind of a report, "" for an unknown one."""
    if not isinstance(data, dict):
        return ""
    rows = data.get("rows")
    by_name = rows_by_name(rows)
    tests: dict[str, Callable[[], bool]] = {
        "advice": lambda: all("answer" in row for row in by_name.values()) and bool(by_name),
        "table": lambda: "table" in data and "metrics" in data and isinstance(rows, list),
        "speeds": lambda: "level" in data and any("train_speedup" in r for r in by_name.values()),
        "training": lambda: any("val_losses" in row for row in by_name.values()),
        "trace": lambda: isinstance(data.get("traceEvents"), list),
        "measurements": lambda: bool(by_name) or bool(listed_tables(data)),
    }
    return next((kind for kind, test in tests.items() if test()), "")


def rows_by_name(rows: Any) -> dict[str, dict[str, Any]]:
    """Return rows by name, each with values by name; {} for a value of another form."""
    is_table = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
    return rows if is_table else {}


def listed_tables(data: dict[str, Any]) -> list[Any]:
    """Return the tables of a page of results, or the cells of a simulation."""
    for key in ("tables", "cells"):
        rows = data.get(key)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return rows
    return []


def name_of(path: Path, report: Any) -> str:
    """Return the name of a report: its title, else that of its file or folder; then its load."""
    title = report.get("title") if isinstance(report, dict) else None
    name = str(title) if title else path.parent.name if path.stem == "results" else path.stem
    load = report.get("load") if isinstance(report, dict) else None
    return f"{name}: load {load['name']}" if isinstance(load, dict) and "name" in load else name


def conditions_of(path: Path) -> dict[str, str]:
    """Return what a checkout's docs/results/conditions.json says of a report of docs."""
    said = read_json(path.parent.parent / "results" / "conditions.json").get(path.stem, {})
    return stated(said) if isinstance(said, dict) else {}


def data_of(kind: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the names of its rows in words; of a trace the operators alone, as it
    may have a million events."""
    if kind == "trace":
        return {"operators": [*operators_of(report["traceEvents"])]}
    every = report.get("every", 2)
    named = dict(report)
    for key in ("rows", "paper"):
        if rows := rows_by_name(report.get(key)):
            named[key] = {row_in_words(name, every): row for name, row in rows.items()}
    return named


def stated(data: dict[str, Any]) -> dict[str, str]:
    """Return the command, the date, the machine and the reading that a file itself states."""
    keys = ("command", "date", "machine", "reading")
    return {key: str(data[key]) for key in keys if isinstance(data.get(key), str)}


def operators_of(events: Sequence[Any]) -> Iterator[tuple[str, float, float, Any]]:
    """Yield name, begin and end in ms, and thread of the operators in a Chrome trace."""
    for event in events:
        if (
            isinstance(event, dict)
            and event.get("ph") == "X"
            and str(event.get("name", "")).startswith("scmoe/")
            and event.get("cat") == "user_annotation"
            and all(isinstance(event.get(key), int | float) for key in ("ts", "dur"))
        ):
            begin_ms = event["ts"] / 1e3
            name = event["name"].removeprefix("scmoe/")
            yield name, begin_ms, begin_ms + event["dur"] / 1e3, event.get("tid")
