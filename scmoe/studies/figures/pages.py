"""All pictures of the docs, each drawn from a report that is kept beside it.

A measuring command with `--out docs/figures` writes NAME.json, its report, and NAME.png. The pictures that are drawn
here are those of every report in that folder, of the tables in TABLES, and of nothing but assumed times.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.studies.figures.concepts import CONCEPTS
from scmoe.studies.figures.draw import EXPLAINED, PAGES, draw_measured
from scmoe.studies.figures.headline import REPORTS, draw_headline
from scmoe.studies.table.chart import draw_differences
from scmoe.testbed import growth, inference_report, offload_report, speed_chart

TABLES = {name: Path(f"docs/results/{name}/results.json") for name in ("table1-digits", "table3-small")}
DRAW: dict[str, Callable[[Any, Path], None]] = {  # by the first words of a report's name
    "overlap-": speed_chart.draw,
    "inference-": inference_report.draw,
    "growth": growth.draw,
    "figure-13": offload_report.draw,
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
    found |= {name: partial(draw_differences, read(path)) for name, path in TABLES.items()}
    if kept := {word: read(reports[name]) for word, name in REPORTS.items() if name in reports}:
        found["headline"] = partial(draw_headline, kept)
    return found


def draw_pictures(out: Path | None) -> list[Path]:
    """Draw all pictures of the docs into `out`, None: where the docs show them. Returns the files."""
    files = []
    for name, draw in pictures().items():
        files.append((out or PAGES) / f"{name}.png")
        draw(files[-1])
    return files


def read(path: Path) -> Any:
    return json.loads(path.read_text())
