"""Part tests: runs the tests marked `gpu` and counts them. On a machine without a GPU all of them skip.

Those of two GPUs skip on a machine with one, and a test skips where it lacks a package that the check does not need.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from scmoe.experiments.bench.gpu.gpu_parts import ROOT, Pieces, Place

FILES = ("tests/unit/test_cuda.py", "tests/unit/test_offload.py")
TWO_GPUS = ("tests/distributed/test_two_gpus.py",)
MAY_SKIP = re.compile("Skipped: not installed: ")
OPTIONS = ("-m", "gpu", "-v", "--tb=short", "--import-mode=importlib", "-o", "addopts=", "-p", "no:cacheprovider")
SHOWN = 10  # tests with another outcome than expected


def pieces(place: Place) -> Pieces:
    one = "skipped" if place.device == "cpu" else "passed"
    two = one if torch.cuda.device_count() > 1 else "skipped"
    return {"gpu tests": lambda: run_tests(FILES, one), "tests of two GPUs": lambda: run_tests(TWO_GPUS, two)}


class Outcomes:
    """A plugin of pytest that keeps the outcome of each test, and why it was not passed."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid], self.why[report.nodeid] = report.outcome, str(report.longrepr)


def run_tests(files: Sequence[str], expected: str) -> dict[str, int]:
    """Returns how many tests had which outcome. RuntimeError: some had another one than expected, or none ran."""
    import pytest

    outcomes = Outcomes()
    code = pytest.main([*(str(ROOT / file) for file in files), *OPTIONS], plugins=[outcomes])
    counts = Counter(outcomes.of.values())
    others = [
        name
        for name, outcome in outcomes.of.items()
        if outcome != expected and not (outcome == "skipped" and MAY_SKIP.search(outcomes.why[name]))
    ]
    if code != 0 or others or not counts[expected]:
        lines = [f"{name}: {outcomes.why[name].splitlines()[-1]}" for name in others[:SHOWN]]
        raise RuntimeError("\n".join([*lines, f"pytest ended with {int(code)}, {dict(counts)}"]))
    return dict(counts)
