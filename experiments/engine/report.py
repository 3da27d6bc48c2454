"""One report for every measurement: a title that gives the conditions, rows, and columns with their formats.

Report("2 ranks, medians of 9 rounds", {"top2": {"ms": 12.3, "quartiles": [11.9, 12.8]}},
       {"ms": "{ms:.1f}", "[quartiles]": "[{quartiles[0]:.1f} {quartiles[1]:.1f}]"}).show()
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table


@dataclass(frozen=True)
class Report:
    """title: conditions. rows: values by the row's name. columns: the format of a cell by its heading, such as
    {"ms": "{ms:.1f}"}; where a row lacks the value, the cell is empty. first: the heading of the names."""

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, str]
    first: str = "row"

    def cells(self) -> list[list[str]]:
        return [[name, *(_cell(text, row) for text in self.columns.values())] for name, row in self.rows.items()]

    def show(self) -> None:
        """Print a table on standard error."""
        numbers = (Column(heading, justify="right", no_wrap=True) for heading in self.columns)
        table = Table(Column(self.first, no_wrap=True), *numbers, title=self.title, title_justify="left")
        for cells in self.cells():
            table.add_row(*cells)
        console(width=150).print(table)

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, below its title."""
        heads = [self.first, *self.columns]
        lines = [heads, ["---"] * len(heads), *self.cells()]
        return "\n".join([self.title, "", *(f"| {' | '.join(cells)} |" for cells in lines), ""])


def _cell(text: str, row: Mapping[str, Any]) -> str:
    try:
        return text.format(**row)
    except (KeyError, TypeError):  # the row lacks the value, or has None
        return ""


def console(width: int | None = None) -> Console:
    """Return the console of tables and notes: standard error, so that standard output is JSON alone. width: of a table
    that no terminal limits."""
    return Console(stderr=True, width=None if width is None or sys.stderr.isatty() else width)


def write_json(path: Path, report: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a report, without the values that are None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(without_none(report), indent=1))


def without_none(value: Any) -> Any:
    """Return nested dictionaries and lists without keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_none(one) for one in value]
    return value
