"""The table of docs/conform.md: questions that a library failed, from docs/results/conform/, and
what is said below it of the others.

python -m experiments.conform.answers_table prints it.
"""

import json
from pathlib import Path
from typing import Any

from experiments.conform.libraries import ANSWERS_FOLDER, LIBRARIES
from scmoe.conform.questions import QUESTION_NAMES
from scmoe.report import markdown_table

CELL_WORDS = {"passed": "yes", "not asked": "–", "crashed": "**crash**", "timed out": "**hangs**"}
GOOD = {CELL_WORDS["passed"], CELL_WORDS["not asked"]}


def results() -> dict[str, dict[str, Any]]:
    """Return the reports in the order of the columns."""
    paths = {name: Path(ANSWERS_FOLDER, f"{name}.json") for name in LIBRARIES}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def table_lines() -> list[str]:
    """Return the lines of the table, in Markdown, and the questions without a failure: those that
    libraries answered, those that only scmoe's layers did, and those that none did."""
    reports = results().values()
    rows = [
        [name, *(cell(report["questions"][name]) for report in reports)] for name in QUESTION_NAMES
    ]
    failed = [row for row in rows if not GOOD.issuperset(row[1:])]
    table = markdown_table(["", *(report["title"] for report in reports)], failed)
    asked: dict[str, list[str]] = {"others": [], "scmoe": [], "none": []}
    for name, *cells in rows:
        if not GOOD.issuperset(cells):
            continue
        who = {
            "scmoe" if report["title"].startswith("scmoe") else "others"
            for report, answer in zip(reports, cells, strict=True)
            if answer == CELL_WORDS["passed"]
        }
        asked["others" if "others" in who else "scmoe" if who else "none"].append(name)
    words = {
        "others": "No layer failed in:",
        "scmoe": "Only scmoe's layers answered, and passed:",
        "none": "No layer could be asked:",
    }
    said = [f"{words[who]} {'; '.join(names)}." for who, names in asked.items() if names]
    return [*table, "", " ".join(said)]


def cell(of_places: dict[str, dict[str, Any]]) -> str:
    """Return the worst answer of all numbers of ranks, a failure before a pass, and its ratio on
    the fewest ranks."""
    entries = of_places.values()
    for entry in entries:
        if entry["answer"] == "failed":
            return "**no**" if entry["ratio"] is None else f"**no**, {entry['ratio']:.3g}"
    for answer in ("crashed", "timed out", "passed", "not asked"):
        if any(entry["answer"] == answer for entry in entries):
            return CELL_WORDS[answer]
    raise AssertionError("a question has an answer on each number of ranks")


if __name__ == "__main__":
    print("\n".join(table_lines()))
