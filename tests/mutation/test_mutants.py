"""Every mutant that `make mutate` uses still applies to the source and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutation import mutate
from tests.mutation.mutant import Mutant
from tests.mutation.mutate import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_applies_and_its_tests_exist(mutant):
    ast.parse(mutant.mutate((ROOT / mutant.file).read_text()))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"^def {name.partition('[')[0]}\(", text, re.MULTILINE), test


def test_each_name_is_one_bug():
    assert (
        len({m.name for m in MUTANTS})
        == len({(m.file, m.old, m.new) for m in MUTANTS})
        == len(MUTANTS)
    )


def test_text_that_is_missing_or_occurs_twice_is_named():
    mutant = MUTANTS[0]
    for source, times in (("", 0), (mutant.old * 2, 2)):
        with pytest.raises(
            ValueError, match=rf"mutant {mutant.name}: .* occurs {times} times in {mutant.file}"
        ):
            mutant.mutate(source)


@pytest.mark.dist
@pytest.mark.faults
def test_a_bug_is_caught_if_the_tests_fail_and_the_tree_stays_as_it_was(tmp_path):
    source = "def add(a, b):\n    return a + b\n"
    (tmp_path / "sums.py").write_text(source)
    (tmp_path / "test_sums.py").write_text(
        "from sums import add\n\ndef test_add():\n    assert add(2, 3) == 5\n"
    )
    bug = Mutant("minus", "sums.py").replaces("a + b", "a - b").caught_by("test_sums.py")
    assert mutate.is_caught(bug, tmp_path)
    assert not mutate.is_caught(bug.replaces("a + b", "b + a"), tmp_path)
    assert not mutate.is_caught(bug.replaces("def add", "def ad"), tmp_path), (
        "an import that breaks"
    )
    assert (tmp_path / "sums.py").read_text() == source
    (tmp_path / "test_fails.py").write_text("def test_fails():\n    assert False\n")
    with pytest.raises(AssertionError, match=r"test_fails\.py fails without a bug"):
        mutate.is_caught(bug.caught_by("test_fails.py"), tmp_path)
