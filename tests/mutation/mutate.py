"""`make mutate` puts each known bug into a copy of the tree, never into the tree itself, and runs
its tests there.

A bug is caught when its tests fail: pytest's exit code is 1. Code 2, an import that breaks, shows
nothing about the tests. Without the bug they must pass, because a test that always fails catches
nothing.

pytest collects this file only by name, so its options choose mutants (`-k`), run again those that
were missed (`--lf`) and list them (`--collect-only`). Each worker of pytest-xdist has a copy of its
own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.mutation import of_ranks, of_runs
from tests.mutation.mutant import Mutant
from tests.support.trees import copy_tree

MUTANTS = (*of_ranks.MUTANTS, *of_runs.MUTANTS)
# A bug that makes a test hang is caught by the test's own watchdog. -n0: ranks need the cores.
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "-n0",
    "--timeout=300",
)
PASSED, FAILED = 0, 1  # exit codes of pytest


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.mark.timeout(0)  # each of its tests has one
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_known_bug_is_caught(mutant: Mutant, tree: Path) -> None:
    assert is_caught(mutant, tree), f"missed by {', '.join(mutant.tests)}"


def is_caught(mutant: Mutant, tree: Path) -> bool:
    """Return whether a test fails with the bug, and leave the tree as it was. AssertionError: a
    test fails without the bug."""
    for test in mutant.tests:
        assert exit_code(tree, test) == PASSED, f"{test} fails without a bug"
    file = tree / mutant.file
    healthy = file.read_text()
    file.write_text(mutant.mutate(healthy))
    try:
        return run_tests(tree, *mutant.tests) == FAILED
    finally:
        file.write_text(healthy)


@cache
def exit_code(tree: Path, test: str) -> int:
    """Run a test of a tree without a bug, once for all mutants that it must catch."""
    return run_tests(tree, test)


def run_tests(tree: Path, *tests: str) -> int:
    """Run tests of a tree with that tree's own packages. No process that they start outlives the
    call."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*PYTEST, *tests], cwd=tree, env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
