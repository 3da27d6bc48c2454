"""Values of a section's tables are shown as a reader writes them."""

import math

import pytest

from scmoe.runs.html_report.section import number

pytest.importorskip("matplotlib")


def test_numbers_that_are_none_and_truths_are_shown():
    assert [number(value) for value in (math.inf, True, False, 1234.5, 3)] == [
        "inf",
        "yes",
        "no",
        "1,234",
        "3",
    ]
