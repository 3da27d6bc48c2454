"""Makes the runs of a table, some beside each other, each an ordinary training; to go on with at any time.

Runs are made seed by seed, so a table that is cut has whole comparisons in it. Finished ones are skipped, a failed one
is marked and the others go on. Ctrl-C and SIGTERM reach every run as SIGTERM: it saves and ends. A lock, which the runs
inherit, keeps a second harness off until the last of them has ended, even where the first was killed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

from experiments.table_runs import Run, State, fraction, keep, outcome, state_of
from scmoe.config.fields import ConfigError

TRAIN = (sys.executable, "-m", "experiments.train")
GRACE_S = 60.0  # for a run that is asked to stop: the checkpoint it writes


@dataclass
class Session:
    """What this call has done, for the time left."""

    runs: list[Run]
    jobs: int
    worked_s: float = 0.0
    progress: float = 0.0  # in runs
    left: dict[str, float] = field(default_factory=dict)  # of each unfinished run

    def seconds_left(self) -> float | None:
        if self.progress < 0.01:
            return None
        return sum(self.left.values()) * self.worked_s / self.progress / max(1, self.jobs)


def run_all(
    runs: Sequence[Run], jobs: int, metric: str, say: Callable[[str], None], watch: Callable[[Session], None]
) -> bool:
    """Make the runs that are not finished, `jobs` beside each other (0: one after the other in this process).

    say: takes a line for each run that ends. watch: called now and then. Returns False if it was asked to stop.
    """
    waiting = [run for run in runs if not _is_finished(run, metric)]
    session = Session(list(runs), jobs, left={run.name: 1 - fraction(run) for run in waiting})
    if skipped := len(runs) - len(waiting):
        say(f"{skipped} of {len(runs)} runs are finished already")
    with lock_of(runs[0].folder) as lock, _stop_request(jobs) as stop:
        active: dict[str, Job] = {}
        try:
            while (waiting and not stop) or active:
                while waiting and not stop and len(active) < max(1, jobs):
                    run = waiting.pop(0)
                    active[run.name] = Job(run, metric, lock, here=jobs == 0)
                for name, job in list(active.items()):
                    if job.ended(session):
                        del active[name]
                        state = job.close(session)
                        stop += [signal.SIGTERM] * (jobs == 0 and state.status == "cut")
                        say(_line(job.run, state, session, metric))
                if stop:
                    for job in active.values():
                        job.stop(kill=len(stop) > 1)
                watch(session)
                if active:
                    time.sleep(0.1)
        finally:
            for job in active.values():  # an error of ours: leave nothing behind
                job.stop(kill=True)
        return not stop


def _is_finished(run: Run, metric: str) -> bool:
    """Also where it came to its end while nobody waited for it: its harness had been killed."""
    state = state_of(run)
    if state.status == "cut" and any((run_dir / "summary.json").exists() for run_dir in run.run_dirs()):
        state = replace(outcome(run, 0, metric), seconds=state.seconds)
        keep(run, state)
    return state.status == "finished"


class Job:
    """A run that is being made, in a process of its own or in this one."""

    def __init__(self, run: Run, metric: str, lock: IO[str], here: bool) -> None:
        self.run, self.metric = run, metric
        self.before = state_of(run)
        self.started = self.seen = time.monotonic()
        self.asked: float | None = None
        self.code: int | None = None
        self.process: Popen[bytes] | None = None
        run.log.parent.mkdir(parents=True, exist_ok=True)
        keep(run, replace(self.before, status="running", summary=None, error=None))
        arguments = run.arguments()
        with run.log.open("a" if "--resume" in arguments else "w") as log:
            if here:
                self.code = train_here(arguments, log)
            else:  # in a session of its own: Ctrl-C reaches us alone, and we stop it with SIGTERM
                command, inherited = [*TRAIN, *arguments], (lock.fileno(),)
                self.process = Popen(command, stdout=log, stderr=log, start_new_session=True, pass_fds=inherited)

    def ended(self, session: Session) -> bool:
        """Also notes the time and how far it is."""
        now, left = time.monotonic(), 1 - fraction(self.run)
        session.worked_s += now - self.seen
        session.progress += max(0.0, session.left[self.run.name] - left)
        session.left[self.run.name], self.seen = left, now
        if self.process is not None:
            self.code = self.process.poll()
        return self.code is not None

    def close(self, session: Session) -> State:
        assert self.code is not None
        state = outcome(self.run, self.code, self.metric)
        state = replace(state, seconds=round(self.before.seconds + time.monotonic() - self.started, 1))
        keep(self.run, state)
        if state.status == "finished":
            session.progress += session.left[self.run.name]
        if state.status != "cut":
            del session.left[self.run.name]
        return state

    def stop(self, kill: bool) -> None:
        """It saves a checkpoint and ends; killed if it takes too long."""
        if self.process is None or self.process.poll() is not None:
            return
        if self.asked is None:
            self.asked = time.monotonic()
            self.process.terminate()
        if kill or time.monotonic() - self.asked > GRACE_S:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def train_here(arguments: list[str], log: IO[str]) -> int:
    """The train command in this process: no start of Python, nothing that ends it from outside."""
    from experiments import train

    before = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(log), redirect_stderr(log):
            return train.main(arguments)
    except SystemExit as end:  # asked to stop, and saved
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:  # a failed run does not end the table
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=log)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def lock_of(folder: Path) -> Iterator[IO[str]]:
    """ConfigError where another process has it, of a table or of a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: its runs are being made already, by another process") from error
        yield lock


@contextmanager
def _stop_request(jobs: int) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM as a list that grows, for as long as it lasts."""
    stop: list[int] = []

    def note(number: int, _: Any) -> None:
        stop.append(number)
        if jobs == 0 and signal.getsignal(signal.SIGTERM) is not note:
            signal.raise_signal(signal.SIGTERM)  # the run in this process has taken it

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(run: Run, state: State, session: Session, metric: str) -> str:
    at = len(session.runs) - len(session.left)
    said = f"{metric} {state.summary[metric]:.4f}" if state.summary else state.error or "goes on at the next call"
    left = session.seconds_left()
    still = f"; {clock(left)} left" if left else ""
    return f"[{at}/{len(session.runs)}] {state.status:8}  {run.title}: {said}, {clock(state.seconds)}{still}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
