"""Test the tests: `python -m experiments.mutate [--only NAME ...] [--resume] [--list]` puts known bugs back in turn.

Each bug of mutants.py goes into a copy of the tree, never into the tree itself, and the tests named with it run there.
Caught: they fail (pytest's exit code 1; code 2, an import that breaks, would say nothing about the tests). Before, all
the named tests run without a bug: a test that fails anyway catches nothing. The last line on standard output is JSON.

Each result is kept as it comes, so a run that was broken off goes on with --resume, where no file has changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from experiments.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n0"]
PASSED, FAILED = 0, 1  # exit codes of pytest
KEPT = ROOT / ".cache/mutate.json"
TIMEOUT_S = 300.0  # for the tests of one mutant; a bug that makes them hang is caught by their own watchdogs


class Outcome(NamedTuple):
    exit_code: int
    seconds: float
    last_line: str


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--resume", action="store_true", help="keep what the last run of this tree has found")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        mutants = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        console.print(table(mutants, {}))
        print(json.dumps({"mutants": len(mutants)}))
        return 0
    outcomes = run_all(mutants, console, options.resume)
    missed = [m.name for m in mutants if outcomes[m.name].exit_code != FAILED]
    console.print(table(mutants, outcomes))
    print(json.dumps({"mutants": len(mutants), "caught": len(mutants) - len(missed), "missed": missed}))
    return 1 if missed else 0


def chosen(names: Sequence[str] | None) -> list[Mutant]:
    """The mutants of these names, all if None. ValueError names one that there is not."""
    known = {m.name: m for m in MUTANTS}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"--only is {unknown[0]}, allowed: {', '.join(known)}")
    return [known[name] for name in names] if names else list(MUTANTS)


def run_all(mutants: Sequence[Mutant], console: Console, resume: bool = False) -> dict[str, Outcome]:
    """Runs each mutant's tests. RuntimeError: tests fail without a bug, so that nothing could be said."""
    columns = (TextColumn("{task.description:36}"), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder, Progress(*columns, console=console) as progress:
        copy = Path(folder)
        tree = copy_tree(copy)
        outcomes = kept(tree) if resume else {}
        to_do = [m for m in mutants if m.name not in outcomes]
        task = progress.add_task("without a bug", total=len(mutants), completed=len(mutants) - len(to_do))
        tests = sorted({test for m in to_do for test in m.tests})
        healthy = run_tests(copy, tests, TIMEOUT_S * 2) if to_do else Outcome(PASSED, 0.0, "")
        if healthy.exit_code != PASSED:
            raise RuntimeError(f"tests fail without a bug: {healthy.last_line}")
        began = time.monotonic()
        for done, mutant in enumerate(to_do, 1):
            progress.update(task, description=mutant.name)
            source = (copy / mutant.file).read_text()  # of the copy: someone may go on working in the tree
            (copy / mutant.file).write_text(mutated(source, mutant))
            outcomes[mutant.name] = outcome = run_tests(copy, mutant.tests, TIMEOUT_S)
            (copy / mutant.file).write_text(source)
            verdict = "caught" if outcome.exit_code == FAILED else f"MISSED (pytest: {outcome.exit_code})"
            keep(tree, outcomes)
            left_s = (time.monotonic() - began) / done * (len(to_do) - done)
            line = f"{mutant.name:36} {verdict} in {outcome.seconds:.0f} s; {done} of {len(to_do)}, {left_s:.0f} s left"
            progress.console.print(line, soft_wrap=True)
            progress.advance(task)
    return outcomes


def keep(tree: str, outcomes: dict[str, Outcome]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({"tree": tree, "outcomes": outcomes}))


def kept(tree: str) -> dict[str, Outcome]:
    """What was found in this same tree, none in another."""
    found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {"tree": None}
    if found["tree"] != tree:
        return {}
    return {name: Outcome(*outcome) for name, outcome in found["outcomes"].items()}


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the bug. ValueError: the text that it replaces is not there exactly once."""
    if (times := source.count(mutant.old)) != 1:
        raise ValueError(f"mutant {mutant.name}: {mutant.old!r} occurs {times} times in {mutant.file}, allowed: once")
    return source.replace(mutant.old, mutant.new)


def copy_tree(target: Path) -> str:
    """What git knows or would take, as it lies in the tree now. Returns a digest of it."""
    digest = hashlib.sha256()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in sorted(filter(None, names)):
        if (ROOT / name).is_file():  # a file may have been deleted and not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
            digest.update(f"{name}\0".encode() + (target / name).read_bytes())
    return digest.hexdigest()


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float) -> Outcome:
    """Runs tests of a tree with its own packages, whatever is installed."""
    settings = [f"PYTHONPATH={tree}", "PYTHONDONTWRITEBYTECODE=1", "OMP_NUM_THREADS=1"]
    began = time.monotonic()
    command = ["env", *settings, *PYTEST, f"--timeout={timeout_s:g}", *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return Outcome(done.returncode, time.monotonic() - began, lines[-1])


def table(mutants: Sequence[Mutant], outcomes: dict[str, Outcome]) -> Table:
    shown = Table(Column("mutant", no_wrap=True), "fault", "file", Column("tests", overflow="fold"), "result")
    for m in mutants:
        result = ""
        if outcomes:
            result = "caught" if outcomes[m.name].exit_code == FAILED else f"MISSED: {outcomes[m.name].last_line}"
        tests = "\n".join(test.removeprefix("tests/") for test in m.tests)
        shown.add_row(m.name, str(m.fault or ""), m.file, tests, result)
    return shown


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
