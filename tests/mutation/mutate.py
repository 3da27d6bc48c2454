"""This command tests the tests: it puts known bugs back, one after the other.

`python -m tests.mutation.mutate [--only NAME ...] [--resume] [--list]`. Each bug of tests/mutation/mutants goes into a
copy of the tree, never into the tree itself, and the tests named with it run there. Two copies run at the same time,
each with its share of the bugs. A bug is caught when the tests fail: pytest's exit code is 1. Code 2, an import that
breaks, shows nothing about the tests. First, each copy runs all tests of its share without a bug, because a test that
always fails catches nothing. The last line on standard output is JSON.

Each result is saved at once. A run that was stopped continues with --resume if no file has changed since. Ctrl-C and
SIGTERM end the running tests and remove the copies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from tests.mutation.mutant import Mutant
from tests.mutation.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n0"]
PASSED, FAILED = 0, 1  # exit codes of pytest
KEPT = ROOT / ".cache/mutate.json"
COPIES = 2  # each runs one process of one thread, which starts ranks of its own
TIMEOUT_S = 300.0  # for each test; a bug that makes a test hang is caught by the test's own watchdog
GRACE_S = 10.0  # for interrupted tests to end what they have started


class Outcome(NamedTuple):
    exit_code: int
    seconds: float
    last_line: str


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these mutants")
    parser.add_argument("--resume", action="store_true", help="keep the results of the last run of this tree")
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
    try:
        outcomes = asyncio.run(run_all(mutants, console, options.resume))
    except (KeyboardInterrupt, asyncio.CancelledError) as stop:
        console.print("interrupted; --resume continues")
        return 128 + (signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    missed = [m.name for m in mutants if outcomes[m.name].exit_code != FAILED]
    console.print(table(mutants, outcomes))
    print(json.dumps({"mutants": len(mutants), "caught": len(mutants) - len(missed), "missed": missed}))
    return 1 if missed else 0


def chosen(names: Sequence[str] | None) -> list[Mutant]:
    """Returns the mutants of these names, or all if None. ValueError names a mutant that does not exist."""
    known = {m.name: m for m in MUTANTS}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"--only is {unknown[0]}, allowed: {', '.join(known)}")
    return [known[name] for name in names] if names else list(MUTANTS)


async def run_all(mutants: Sequence[Mutant], console: Console, resume: bool = False) -> dict[str, Outcome]:
    """Runs each mutant's tests. RuntimeError: tests fail without a bug, so results would show nothing.

    Ctrl-C raises KeyboardInterrupt and SIGTERM raises CancelledError, after the running tests have ended.
    """
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    columns = (TextColumn("{task.description:36}"), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder, Progress(*columns, console=console) as progress:
        copies = [Path(folder) / str(i) for i in range(COPIES)]
        tree = copy_tree(copies[0])
        for copy in copies[1:]:
            shutil.copytree(copies[0], copy, symlinks=True)
        outcomes = kept(tree) if resume else {}
        to_do = [m for m in mutants if m.name not in outcomes]
        tried: list[Outcome] = []

        def found(mutant: Mutant, outcome: Outcome) -> None:
            outcomes[mutant.name] = outcome
            tried.append(outcome)
            keep(tree, outcomes)
            verdict = "caught" if outcome.exit_code == FAILED else f"MISSED (pytest: {outcome.exit_code})"
            left = len(to_do) - len(tried)
            left_s = left * sum(o.seconds for o in tried) / len(tried) / COPIES
            times = f"in {outcome.seconds:.0f} s; {len(tried)} of {len(to_do)}, {left_s:.0f} s left"
            progress.console.print(f"{mutant.name:36} {verdict} {times}", soft_wrap=True)

        shares = [
            asyncio.create_task(run_share(copy, share, progress, found))
            for i, copy in enumerate(copies)
            if (share := to_do[i::COPIES])
        ]
        try:
            await asyncio.gather(*shares)
        finally:
            for task in shares:
                if not task.cancelling():  # once: a second time would interrupt its clean-up
                    task.cancel()
            await asyncio.gather(*shares, return_exceptions=True)
    return outcomes


async def run_share(
    copy: Path, mutants: Sequence[Mutant], progress: Progress, found: Callable[[Mutant, Outcome], None]
) -> None:
    """Runs the tests of these mutants in a copy of the tree, first without a bug, then with one after the other."""
    task = progress.add_task("without a bug", total=len(mutants))
    healthy = await run_tests(copy, sorted({test for m in mutants for test in m.tests}), TIMEOUT_S * 2)
    if healthy.exit_code != PASSED:
        raise RuntimeError(f"tests fail without a bug: {healthy.last_line}")
    for mutant in mutants:
        progress.update(task, description=mutant.name)
        source = (copy / mutant.file).read_text()  # from the copy: the tree may have changed since
        (copy / mutant.file).write_text(mutated(source, mutant))
        outcome = await run_tests(copy, mutant.tests, TIMEOUT_S)
        (copy / mutant.file).write_text(source)
        found(mutant, outcome)
        progress.advance(task)


def keep(tree: str, outcomes: dict[str, Outcome]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps({"tree": tree, "outcomes": outcomes}))


def kept(tree: str) -> dict[str, Outcome]:
    """Returns the stored results if they are of this tree, otherwise none."""
    found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {"tree": None}
    if found["tree"] != tree:
        return {}
    return {name: Outcome(*outcome) for name, outcome in found["outcomes"].items()}


def mutated(source: str, mutant: Mutant) -> str:
    """Returns the source with the bug. ValueError: the text that it replaces does not occur exactly once."""
    if (times := source.count(mutant.old)) != 1:
        raise ValueError(f"mutant {mutant.name}: {mutant.old!r} occurs {times} times in {mutant.file}, allowed: once")
    return source.replace(mutant.old, mutant.new)


def copy_tree(target: Path) -> str:
    """Copies the files that git tracks or would add, as they are in the tree now. Returns a digest of them."""
    digest = hashlib.sha256()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in sorted(filter(None, names)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (target / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():  # a file may have been deleted and not yet committed
            shutil.copy(ROOT / name, target / name)
            digest.update(f"{name}\0".encode() + (target / name).read_bytes())
    return digest.hexdigest()


async def run_tests(tree: Path, tests: Sequence[str], timeout_s: float) -> Outcome:
    """Runs tests of a tree with that tree's own packages. No process that they start outlives the call."""
    settings = [f"PYTHONPATH={tree}", "PYTHONDONTWRITEBYTECODE=1", "OMP_NUM_THREADS=1"]
    command = ["env", *settings, *PYTEST, f"--timeout={timeout_s:g}", *tests]
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:  # no pipe: a leftover process would hold it open
        process = await asyncio.create_subprocess_exec(
            *command, cwd=tree, stdout=output, stderr=output, start_new_session=True
        )
        try:
            exit_code = await process.wait()
        finally:
            await end(process)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or [""]
    return Outcome(exit_code, time.monotonic() - began, lines[-1])


async def end(process: asyncio.subprocess.Process) -> None:
    """Ends a process and its group, first as Ctrl-C would, so that pytest cleans up."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


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
