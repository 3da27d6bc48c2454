"""The trials of a sweep on this machine, one after the other: each an ordinary training run in a process of its own.

    <runs_dir>/sweeps/<sweep>/   trials.json   the sweep as it was begun, and all trials
                                 trial-003/    <stamp>-.../, the run's directory, and output.txt, what it printed

A trial that was cut goes on from its newest checkpoint. A lock, which trials inherit, keeps a second runner off until
the last process of the first one has ended.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from experiments.harness import lock_of
from experiments.sweep_config import Sweep, words
from experiments.sweep_search import Trial, hopeless, propose
from scmoe.config.fields import ConfigError
from scmoe.parallel.checkpoint.durable import write_durably

GRACE_S = 60.0  # for a trial that is asked to stop: the checkpoint it writes
POLL_S = 0.2
STOPPED = (143, -signal.SIGTERM)  # how a training ends that was asked to stop


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; the trial has been stopped and the state is kept."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def run_trials(sweep: Sweep, trials: list[Trial], watch: Callable[[Trial], None]) -> None:
    """Goes on with the trials there are, then makes new ones until the search has no more.

    watch: called now and then, and when a trial has ended. Raises Interrupted; ConfigError if another process is at it,
    or if a trial has not logged the sweep's metric.
    """
    with lock_of(sweep.folder) as lock, _signals():
        for trial in trials:
            if trial.state in ("running", "cut"):
                _run(sweep, trial, trials, lock, watch)
        while (proposed := propose(sweep, trials)) is not None:
            trials.append(proposed)
            _run(sweep, proposed, trials, lock, watch)


def _run(sweep: Sweep, trial: Trial, trials: list[Trial], lock: IO[str], watch: Callable[[Trial], None]) -> None:
    """One trial to its end, whatever that is."""
    home = sweep.folder / f"trial-{trial.number:03}"
    home.mkdir(parents=True, exist_ok=True)
    others, before = [t for t in trials if t is not trial and t.state != "failed"], trial.seconds
    trial.state = "running"
    keep(sweep, trials)
    started, too_bad, process = time.monotonic(), False, None
    try:
        with (home / "output.txt").open("a") as output:  # a session of its own: Ctrl-C reaches this process alone
            process = subprocess.Popen(
                _command(sweep, trial, home),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
        while process.poll() is None:
            time.sleep(POLL_S)
            _look(sweep, trial, home)
            trial.seconds = before + time.monotonic() - started
            if not too_bad and hopeless(sweep, trial, others):
                too_bad = True
                process.terminate()
            watch(trial)
    finally:  # nothing of it outlives this; an end by itself in the meantime is one
        trial.state = "cut"  # stays so where a second Ctrl-C breaks off the waiting
        code = _end(process)
        _look(sweep, trial, home)
        trial.state = {0: "finished"}.get(code, "cut" if code in STOPPED else "failed")
        if too_bad and trial.state == "cut":
            trial.state = "stopped"
        trial.reason = _last_line(home / "output.txt") if trial.state == "failed" else ""
        keep(sweep, trials)
    watch(trial)
    if trial.state == "finished" and trial.value is None:
        known = ", ".join(name for name in _columns(trial) if "/" in name)
        raise ConfigError(
            f"metric.name is {sweep.metric!r}, which trial {trial.number} has not logged, allowed: {known}"
        )


def _end(process: subprocess.Popen[bytes] | None) -> int:
    """Asks a process to stop, if it has not, and sees to it that nothing of its session is left. Its exit code."""
    if process is None:
        return -signal.SIGTERM
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    finally:  # also where a second Ctrl-C breaks off the waiting
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return -signal.SIGTERM if code == -signal.SIGKILL else code


def _command(sweep: Sweep, trial: Trial, home: Path) -> list[str]:
    """To go on with the trial, if it has a checkpoint, else to begin it."""
    run_dir = _run_dir(home)
    if run_dir is not None and any(run_dir.glob("checkpoints/*.ckpt")):
        return [*sweep.launcher, "--resume", str(run_dir)]
    own = [f"name={home.name}", f"runs_dir={sweep.folder}", f"logger.group={sweep.name}"]
    if project := sweep.raw.get("project"):
        own.append(f"logger.project={project}")
    return [*sweep.launcher, sweep.config, *words(trial.parameters), *sweep.overrides, *own]


# ---------------------------------------------------------------------- what a trial has done


def _run_dir(home: Path) -> Path | None:
    """The newest."""
    return max((path.parent for path in home.glob("*/config.yaml")), default=None)


def _look(sweep: Sweep, trial: Trial, home: Path) -> None:
    """Reads the run's metrics into the trial."""
    run_dir = _run_dir(home)
    if run_dir is None or not (run_dir / "metrics.csv").exists():
        return
    trial.run_dir = str(run_dir)
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trial.history = [float(row[sweep.metric]) for row in rows if row.get(sweep.metric)]
    trial.steps = max((int(row["step"]) + 1 for row in rows if row.get("step")), default=0)


def _columns(trial: Trial) -> list[str]:
    with (Path(trial.run_dir) / "metrics.csv").open(newline="") as file:
        return next(csv.reader(file), [])


def _last_line(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("[rank0]: ")[:200] if lines else "it said nothing"


# ---------------------------------------------------------------------- state


def kept(sweep: Sweep) -> list[Trial]:
    """The trials of an earlier call. ConfigError if they were those of another sweep; run_cap may change."""
    path = sweep.folder / "trials.json"
    if not path.exists():
        return []
    state, now = json.loads(path.read_text()), _identity(sweep)
    if changed := [key for key in {**state["sweep"], **now} if state["sweep"].get(key) != now.get(key)]:
        allowed = "the file as it was, another name, or that folder removed"
        raise ConfigError(f"{', '.join(changed)} is not as it was when {sweep.folder} was begun, allowed: {allowed}")
    return [Trial(**trial) for trial in state["trials"]]


def keep(sweep: Sweep, trials: list[Trial]) -> None:
    """Whole or not at all."""
    path = sweep.folder / "trials.json"
    fresh = path.with_suffix(".tmp")
    state = {"sweep": _identity(sweep), "trials": [asdict(trial) for trial in trials]}
    write_durably(fresh, json.dumps(state, indent=2) + "\n")
    os.replace(fresh, path)


def _identity(sweep: Sweep) -> dict[str, Any]:
    """What makes it this sweep: all but how long it goes on and how it is called."""
    same = {key: value for key, value in sweep.raw.items() if key not in ("run_cap", "name", "description")}
    return json.loads(json.dumps(same))


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM as Interrupted."""

    def interrupt(signum: int, _: Any) -> None:
        raise Interrupted(signum)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
