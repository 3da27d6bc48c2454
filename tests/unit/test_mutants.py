"""The list of bugs that `make mutate` puts back keeps up with the source: each still applies, and names real tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from experiments import mutate
from experiments.mutants import MUTANTS
from experiments.mutate import Outcome, chosen, mutated

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_a_mutant_applies_and_its_tests_are_there(mutant):
    source = mutated((ROOT / mutant.file).read_text(), mutant)
    ast.parse(source)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"^def {name.partition('[')[0]}\(", text, re.MULTILINE), test


def test_there_are_twenty_faults_and_each_name_is_one_bug():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert len({m.fault for m in MUTANTS if m.fault}) >= 20
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


def test_text_that_is_gone_or_comes_twice_is_named():
    mutant = MUTANTS[0]
    for source, times in (("", 0), (mutant.old * 2, 2)):
        with pytest.raises(ValueError, match=rf"mutant {mutant.name}: .* occurs {times} times in {mutant.file}"):
            mutated(source, mutant)


def test_an_unknown_name_is_refused():
    assert [m.name for m in chosen([MUTANTS[1].name])] == [MUTANTS[1].name]
    with pytest.raises(ValueError, match="--only is nothing, allowed: "):
        chosen(["nothing"])


def test_results_are_kept_for_the_same_tree_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "KEPT", tmp_path / "cache" / "mutate.json")
    outcomes = {"a": Outcome(1, 2.0, "1 failed")}
    assert mutate.kept("tree") == {}
    mutate.keep("tree", outcomes)
    assert mutate.kept("tree") == outcomes
    assert mutate.kept("changed") == {}
