"""Draws all pictures and tables of the docs from stored reports and results.

A measuring command with `--out docs/figures` writes its report, NAME.json, and NAME.png. `table --to docs/results`
writes NAME/results.json. This file draws a picture for each report and for each table, and the pictures of assumed
operator times, which need no measurement.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench import growth, inference, offload, speed_chart
from scmoe.experiments.figures.concepts import CONCEPTS
from scmoe.experiments.figures.draw import EXPLAINED, PAGES, draw_measured
from scmoe.experiments.figures.headline import REPORTS, draw_headline
from scmoe.experiments.figures.scenarios import draw_shares, draw_speeds, read_reports
from scmoe.experiments.studies.table.table_report import draw_differences, draw_equal_time, markdown

RESULTS = Path("docs/results")
SCENARIOS = PAGES / "figure-8"
DRAW: dict[str, Callable[[Any, Path], None]] = {  # by the first words of a report's name
    "overlap-": speed_chart.draw,
    "inference-": inference.draw,
    "growth": growth.draw,
    "figure-13": offload.draw,
    "figure-9": draw_measured,
    "figure-10": draw_measured,
}


def pictures() -> dict[str, Callable[[Path], None]]:
    """Return for the name of each picture of the docs what draws it into a file. Raises ConfigError."""
    found: dict[str, Callable[[Path], None]] = {draw.__name__: draw for draw in (*EXPLAINED.values(), *CONCEPTS)}
    reports = {path.stem: path for path in sorted(PAGES.glob("*.json"))}
    for name, path in reports.items():
        kind = next((start for start in DRAW if name.startswith(start)), None)
        if kind is None:
            raise ConfigError(f"{path} is no report that is drawn, allowed: names that begin with {' | '.join(DRAW)}")
        found[name] = partial(DRAW[kind], read(path))
    if any(SCENARIOS.glob("*.json")):  # what `make figure8` has measured
        scenarios = read_reports([SCENARIOS])
        found |= {"figure-1": partial(draw_shares, scenarios), "figure-8": partial(draw_speeds, scenarios)}
    for path in sorted(RESULTS.glob("table[1-7]-*/results.json")):
        results = read(path)
        found[path.parent.name] = partial(draw_differences, results)
        if len(results["equal_time"]) > 1:
            found[f"{path.parent.name}-equal-time"] = partial(draw_equal_time, results)
    if kept := {word: read(reports[name]) for word, name in REPORTS.items() if name in reports}:
        found["headline"] = partial(draw_headline, kept)
    return found


def tables() -> dict[Path, str]:
    """Return the text of each table of the docs by its file."""
    return {path.with_name("table.md"): markdown(read(path)) for path in sorted(RESULTS.glob("*/results.json"))}


def write_pages(out: Path | None) -> list[Path]:
    """Draw all pictures of the docs into `out`; None: where the docs show them, and write all tables. Returns the
    files."""
    files = []
    for name, draw in pictures().items():
        files.append((out or PAGES) / f"{name}.png")
        draw(files[-1])
    for path, text in tables().items() if out is None else ():
        path.write_text(text)
        files.append(path)
    return files


def read(path: Path) -> Any:
    return json.loads(path.read_text())
