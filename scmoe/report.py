"""One report for every measurement: a title that gives the conditions, rows, and columns with their
formats.

    rows = {"top2": {"ms": 12.3, "quartiles": [11.9, 12.8]}}
    columns = {"ms": "{ms:.1f}", "[quartiles]": "[{quartiles[0]:.1f} {quartiles[1]:.1f}]"}
    Report("medians of 9 rounds", rows, columns).show()

`bullets_and_tables` needs no columns: it shows any nested dictionaries as Markdown.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from scmoe.files import replacing

LONG = 60  # letters of a cell that may be broken
TABLE_WIDTH = 170  # columns of the widest table, also where a terminal has fewer
PIPED = 100  # columns where there is no terminal


@dataclass(frozen=True)
class Report:
    """title: conditions. rows: values by the row's name. columns: the format of a cell by its
    heading, such as {"ms": "{ms:.1f}"}; where a row lacks the value, the cell is empty. first: the
    heading of the names.
    """

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, str]
    first: str = "row"

    def cells(self) -> list[list[str]]:
        return [
            [name, *(_cell(text, row) for text in self.columns.values())]
            for name, row in self.rows.items()
        ]

    def show(self) -> None:
        """Print a table on standard error."""
        columns: list[Column] = []
        for heading, *cells in zip([self.first, *self.columns], *self.cells(), strict=True):
            short = max(map(len, cells), default=0) < LONG
            columns.append(
                Column(Text(heading), justify="right" if columns else "left", no_wrap=short)
            )
        table = Table(*columns, title=Text(self.title), title_justify="left")
        for cells in self.cells():
            table.add_row(*map(Text, cells))  # as Text, brackets are no markup
        screen = console()
        screen.width = TABLE_WIDTH
        screen.print(table)

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, below its title."""
        return "\n".join(
            [self.title, "", *markdown_table([self.first, *self.columns], self.cells()), ""]
        )


def _cell(text: str, row: Mapping[str, Any]) -> str:
    try:
        return text.format(**row)
    except (KeyError, TypeError):  # the row lacks the value, or has None
        return ""


def console(piped: int = PIPED, stderr: bool = True) -> Console:
    """Return a console that is as wide as the terminal, or has `piped` columns where there is none.
    It is on standard error, as standard output is for JSON. stderr=False: for a verb without
    JSON."""
    screen = Console(stderr=stderr, highlight=False)
    if not screen.is_terminal:
        screen.width = piped
    return screen


def say(line: str) -> None:
    """Print a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)


def print_result(result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a verb's result as JSON on standard output, for programs. A person at a terminal has
    read it in words."""
    if not sys.stdout.isatty():
        print(json.dumps(result), flush=True)


def write_json(path: Path, report: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a report into a file, whose folder need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=1), encoding="utf-8")


def publish(
    report: Mapping[str, Any],
    tables: Sequence[Report],
    draw: Callable[[Any, Path], None],
    name: Path,
) -> None:
    """Write a report, print its tables, and draw its chart: the files NAME.json and NAME.png, whose
    folder need not exist."""
    write_json(Path(f"{name}.json"), report)
    for table in tables:
        table.show()
    draw(report, Path(f"{name}.png"))
    say(f"chart and figures: {name}.png, .json")


def bullets_and_tables(value: Any) -> list[str]:
    """Return a value's lines as Markdown: plain entries as a list, each dictionary of dictionaries
    as a table."""
    if not isinstance(value, dict):
        return [in_one_line(value)]
    if "error" in value:
        return ["```text", value["error"], "```"]
    tables = {key: entry for key, entry in value.items() if _is_table(entry)}
    lines = bullets({key: entry for key, entry in value.items() if key not in tables})
    for key, rows in tables.items():
        lines += ["", f"{key}:", "", *rows_table(rows)]
    return lines


def _is_table(value: Any) -> bool:
    """Return whether a value is a dictionary of dictionaries that is not empty."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(row, dict) for row in value.values())
    )


def bullets(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each value."""
    return [f"- {key}: {in_one_line(value)}" for key, value in values.items()]


def rows_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table with a line for each row and a column for each key that a row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [
        [name, *(in_one_line(row.get(key, "")) for key in columns)] for name, row in rows.items()
    ]
    return markdown_table(["", *columns], cells)


def markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False
) -> list[str]:
    """Return the lines of a table in GitHub's Markdown. numbers: all columns but the first are at
    the right."""
    cells = [[cell.replace("|", "/") for cell in row] for row in rows]
    sides = ["---", *["---:" if numbers else "---" for _ in headings[1:]]]
    return [f"| {' | '.join(row)} |" for row in (headings, sides, *cells)]


def in_one_line(value: Any) -> str:
    """Return a value on one line; numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_one_line, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {in_one_line(entry)}" for key, entry in value.items())
    return str(value).replace("\n", " ")
