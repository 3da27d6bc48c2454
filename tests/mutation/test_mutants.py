"""Every mutant that `make mutate` uses still applies to the source and names tests that exist."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mutation import mutate
from tests.mutation.mutants import MUTANTS
from tests.mutation.mutate import Outcome, chosen, mutated

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_a_mutant_applies_and_its_tests_exist(mutant):
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


def test_text_that_is_missing_or_occurs_twice_is_named():
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


# ---------------------------------------------------------------------- a tree of one source and its tests

SLOW = """
import os, time
from pathlib import Path

def test_slow():
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    time.sleep(600)
"""
RUN = """
import os, signal, sys
from pathlib import Path
from tests.mutation import mutate
from tests.mutation.mutant import Mutant
mutate.ROOT, mutate.KEPT = Path.cwd(), Path.cwd() / ".cache/mutate.json"
changes = {"minus": "a - b", "times": "a * b", "the same": "b + a"}  # the tests catch two; the third changes nothing
mutate.MUTANTS = tuple(Mutant(name, 0, "sums.py", "a + b", new, (sys.argv[1],)) for name, new in changes.items())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs inherit an ignored SIGINT
raise SystemExit(mutate.main(sys.argv[2:]))
"""


@pytest.fixture
def small_tree(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tree / "test_sums.py").write_text("from sums import add\n\ndef test_add():\n    assert add(2, 3) == 5\n")
    (tree / "test_slow.py").write_text(SLOW)
    (tree / ".gitignore").write_text(".cache\n")
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    (tmp_path / "pids").mkdir()
    (tmp_path / "temporary").mkdir()
    return tree


def start(tree: Path, test: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts `python -m tests.mutation.mutate` for that tree. Its copies are in a folder next to the tree."""
    variables = {"PIDS": str(tree.parent / "pids"), "TMPDIR": str(tree.parent / "temporary"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, test, *arguments]
    return subprocess.Popen(
        command, cwd=tree, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.dist
def test_every_copy_has_its_share_and_tests_run_without_a_bug_first(small_tree):
    process = start(small_tree, "test_sums.py")
    found, said = process.communicate()
    assert json.loads(found) == {"mutants": 3, "caught": 2, "missed": ["the same"]}, said
    assert process.returncode == 1
    assert re.search(r"minus +caught in \d+ s; [123] of 3, \d+ s left", said)
    assert re.search(r"the same +MISSED \(pytest: 0\) in ", said)
    assert not list((small_tree.parent / "temporary").iterdir())

    resumed, said = start(small_tree, "test_sums.py", "--resume").communicate()
    assert resumed == found and " s left" not in said, "nothing runs twice"

    (small_tree / "sums.py").write_text("def add(a, b):\n    return 5 + 0 * (a + b) + 1\n")
    found, said = start(small_tree, "test_sums.py", "--resume").communicate()
    assert "RuntimeError: tests fail without a bug: 1 failed" in said and not found


@pytest.mark.dist
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(small_tree, number, code):
    process = start(small_tree, "test_slow.py")
    pids = small_tree.parent / "pids"
    while len(list(pids.iterdir())) < 2:  # both copies
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    found, said = process.communicate()
    assert (process.returncode, found) == (code, ""), said
    assert "interrupted; --resume continues" in said
    assert not list((small_tree.parent / "temporary").iterdir())
    for pid in pids.iterdir():
        assert not Path("/proc", pid.name).exists(), (Path("/proc", pid.name) / "status").read_text()
