"""What the words of the command line lead to: runs, and JSON files of reports.

Every text of them passes `clean`: keys and names of machines do not reach the page.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.runs.html_report.cleaner import Cleaner, cleaner_for
from scmoe.runs.html_report.kept_reports import (
    READABLE,
    named_results,
    read_report,
    reports_in,
    sections_of_file,
)
from scmoe.runs.html_report.section import Section
from scmoe.runs.seen import SeenRun, find_runs, readable

RUNS = Path("runs")


@dataclass
class Sources:
    """runs: the newest first. reports: the sections of reports."""

    runs: list[SeenRun] = field(default_factory=list)
    reports: list[Section] = field(default_factory=list)


def find_sources(names: Sequence[str], last: int) -> tuple[Sources, Cleaner]:
    """Return what the names of a command line lead to, and what cleans texts of it.

    names: runs, folders, files, or names below runs/ and, in a checkout, of results; none: the
    folder runs. last: how many of the newest runs of a folder are shown. Raises ConfigError.
    """
    paths = [located(name) for name in names] or [path for path in (RUNS,) if path.is_dir()]
    asked: list[SeenRun] = []
    files: dict[Path, bool] = {}  # whether it is named, or found in a folder
    for path in paths:
        if path.is_file():
            files[path] = True
        elif (path / "config.yaml").exists():
            asked.append(SeenRun(path))
        else:
            in_folder = find_runs(path)
            asked += in_folder[:last]
            files = dict.fromkeys(files_beside(in_folder, path), False) | files
    runs = readable({run.path.resolve(): SeenRun(run.path.resolve()) for run in asked}.values())
    clean = cleaner_for(runs)
    sources = Sources(sorted(runs, key=lambda run: run.begun, reverse=True))
    for path, named in files.items():
        sources.reports += sections_of_file(path, named, clean)

    if not sources.runs and not sources.reports:
        where = " and ".join(names) or f"the folder {RUNS}/"
        raise ConfigError(
            f"There is nothing to report in {where}. Train a run first, or name {READABLE}."
        )
    return sources, clean


def files_beside(runs: Sequence[SeenRun], folder: Path) -> list[Path]:
    """Return the JSON files of a folder that are in none of its runs."""
    of_runs = {run.path for run in runs}
    files = [path for path in folder.rglob("*.json") if path.is_file()]
    return sorted(path for path in files if not of_runs & {*path.parents})


def located(name: str) -> Path:
    """Return the file or folder that a word of the command line names. Raises ConfigError."""
    results = named_results()
    for path in (Path(name), RUNS / name):
        if path.exists():
            return path
    if name in results:
        return results[name]
    shown = sorted(word for word, path in results.items() if path.is_dir() or has_report(path))
    alike = get_close_matches(name, shown, n=5, cutoff=0.5) or shown
    names = f", or a result: {', '.join(alike)}" if alike else ""
    raise ConfigError(f"There is no {name!r}. Name {READABLE}{names}.")


def has_report(path: Path) -> bool:
    """Return whether a JSON file has a report."""
    with suppress(OSError, ValueError):
        return bool(reports_in(read_report(path)))
    return False
