"""Part tests: runs the tests marked `gpu` and counts them. On a machine without a GPU all of them skip."""

from collections import Counter
from typing import Any

from scmoe.experiments.bench.gpu.gpu_parts import ROOT, Pieces, Place

FILES = (ROOT / "tests/unit/test_cuda.py",)
OPTIONS = ("-m", "gpu", "-v", "--tb=short", "--import-mode=importlib", "-o", "addopts=", "-p", "no:cacheprovider")
SHOWN = 10  # tests with another outcome than expected


def pieces(place: Place) -> Pieces:
    return {"gpu tests": lambda: run_tests("skipped" if place.device == "cpu" else "passed")}


class Outcomes:
    """A plugin of pytest that keeps the outcome of each test, and why it was not passed."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid], self.why[report.nodeid] = report.outcome, str(report.longrepr)


def run_tests(expected: str) -> dict[str, int]:
    """Returns how many tests had which outcome. RuntimeError: some had another one than expected, or none ran."""
    import pytest

    outcomes = Outcomes()
    code = pytest.main([*map(str, FILES), *OPTIONS], plugins=[outcomes])
    counts = Counter(outcomes.of.values())
    others = [name for name, outcome in outcomes.of.items() if outcome != expected]
    if code != 0 or others or not counts[expected]:
        lines = [f"{name}: {outcomes.why[name].splitlines()[-1]}" for name in others[:SHOWN]]
        raise RuntimeError("\n".join([*lines, f"pytest ended with {int(code)}, {dict(counts)}"]))
    return dict(counts)
