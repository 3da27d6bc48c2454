"""The page of one long sequence a rank: two batches in flight would need two.

It shows the reports of `scmoe bench overlap` in docs/figures/one-sequence.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docs.build import two_batches
from docs.build.two_batches import OverlapReport
from scmoe.report import Report

SEQUENCE_PAGE = "one-sequence"  # of the page, of its picture, and of the folder of its reports


def read_reports(figures: Path) -> list[dict[str, Any]]:
    """Return the reports by the length of the sequence. figures: a folder."""
    reports = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (figures / SEQUENCE_PAGE).glob("*.json")
    ]
    return sorted(reports, key=lambda report: report["tokens"])


def tables(reports: Sequence[OverlapReport]) -> list[Report]:
    """Return a table with a column for each length of the sequence."""
    by_length = two_batches.Group(
        "tokens",
        "tokens of the sequence",
        f"Iterations of eight blocks, one sequence a rank. {two_batches.SPEEDUPS}",
        "{tokens:,} tokens, share {comm_share:.2f}",
        [*reports],
    )
    return [two_batches.table_of(by_length)]
