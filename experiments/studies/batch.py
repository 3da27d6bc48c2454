"""Many trainings as one batch, each in a process of its own (or all in this one), which can be stopped at any time.

A batch skips finished jobs, resumes interrupted ones from their newest checkpoint, marks failed ones and continues
with the rest. Ctrl-C and SIGTERM reach every training as SIGTERM: it saves a checkpoint and ends. What differs between
studies is handed in: which job comes next, what a training's result is, and whether it is worth its time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from subprocess import DEVNULL, Popen
from typing import IO, Any

from scmoe.experiments.studies.job import Job, fraction, last_line

STOPPED = (143, 130, -signal.SIGTERM, -signal.SIGINT)  # exit codes of a training that was asked to stop
GRACE_S = 60.0  # time for a training that is asked to stop, to write its checkpoint
POLL_S = 0.1


@dataclass
class Batch:
    """Jobs to run, `slots` in parallel (0: one after the other in this process, by `here`).

    jobs: those known so far. propose: returns the next one after them, or None. look: reads a running job's results and
    says whether to stop it early. judge: reads a finished job's results, may call it failed, and may return a job that
    follows it at once. watch: is called now and then, and with each job that has ended. total: how many jobs there will
    be, None: unlimited.
    here: runs a verb of `scmoe` in this process, such as `here("train", ...)`, and returns its exit code.
    """

    jobs: list[Job]
    slots: int
    total: int | None
    watch: Callable[[Batch, Job | None], None]
    propose: Callable[[], Job | None] = lambda: None
    look: Callable[[Job], bool] = lambda job: False
    judge: Callable[[Job], Job | None] = lambda job: None
    here: Callable[..., int] | None = None
    waiting: list[Job] = field(default_factory=list)
    worked_s: float = 0.0  # by all slots of this session
    progress: float = 0.0  # of this session, in jobs

    def run(self, lock: IO[str], again: Sequence[str] = ("waiting", "cut")) -> int:
        """Run the jobs whose status is in `again`, then the proposed ones. Returns the signal that stopped it, or 0."""
        begun = [job for job in self.jobs if job.state.status in again]
        self.waiting += [job for job in begun if not self._has_ended_meanwhile(job)]
        running: list[Running] = []
        with _stop_requests() as signals:
            try:
                while True:
                    while not signals and len(running) < max(1, self.slots):
                        job = self.waiting.pop(0) if self.waiting else self.propose()
                        if job is None:
                            break
                        running.append(Running(job, lock, self.here if self.slots == 0 else None))
                    if not running:
                        return signals[0] if signals else 0
                    for one in list(running):
                        if self._poll(one):
                            running.remove(one)
                            if self.slots == 0 and one.job.state.status == "cut":
                                signals.append(signal.SIGINT if one.code == 130 else signal.SIGTERM)
                        elif signals:
                            one.stop(kill=len(signals) > 1)
                    if running:
                        self.watch(self, None)
                        time.sleep(POLL_S)
            finally:
                for one in running:  # after an error of this process: no training may outlive it
                    one.stop(kill=True)
                for one in running:
                    self._close(one)

    def seconds_left(self) -> float | None:
        """Estimate from this session's progress; None: nothing to estimate from."""
        if self.total is None or self.progress < 0.01:
            return None
        left = self.total - self.done()
        return left * self.worked_s / self.progress / max(1, self.slots)

    def done(self) -> float:
        """Return how many jobs are done; a part of one counts."""
        ended = [job for job in self.jobs if job.state.has_ended and job not in self.waiting]
        return len(ended) + sum(job.state.done for job in self.jobs if job not in ended)

    def _has_ended_meanwhile(self, job: Job) -> bool:
        """Notice a training that came to its end after the process that started it had been killed."""
        ended = job.state.status == "cut" and any((path / "summary.json").exists() for path in job.run_dirs())
        if ended:
            self._settle(job, code=0)
        return ended

    def _poll(self, one: Running) -> bool:
        """Read how far a training is, and whether it has ended."""
        code = one.poll()
        state, now = one.job.state, time.monotonic()
        self.worked_s += now - one.seen
        state.seconds += now - one.seen
        one.seen = now
        before, state.done = state.done, max(state.done, fraction(one.job.log))
        self.progress += state.done - before
        if code is None:
            if self.look(one.job):
                one.hopeless = True
                one.stop()
            return False
        self._close(one)
        return True

    def _close(self, one: Running) -> None:
        one.end()
        before = one.job.state.done
        self._settle(one.job, one.code, one.asked is not None, one.hopeless)
        if one.job.state.status in ("finished", "stopped"):
            self.progress += 1 - before
        self.watch(self, one.job)

    def _settle(self, job: Job, code: int | None, asked: bool = False, hopeless: bool = False) -> None:
        """Set and keep the state of a training that ended with this exit code."""
        run_dirs, state = job.run_dirs(), job.state
        state.run_dir, state.seconds = str(run_dirs[0]) if run_dirs else None, round(state.seconds, 1)
        self.look(job)
        if code == 0:
            state.status, state.done = "finished", 1.0
            if following := self.judge(job):
                self.jobs.append(following)
                self.waiting.insert(0, following)
        elif code in STOPPED or asked:  # a launcher ends with a code of its own
            state.status = "stopped" if hopeless else "cut"
        else:
            state.status, state.error = "failed", f"exit code {code}: {last_line(job.log)}"
        job.keep()


class Running:
    """A job whose training runs in a process of its own, or has run in this one."""

    def __init__(self, job: Job, lock: IO[str], here: Callable[..., int] | None) -> None:
        self.job, self.seen, self.hopeless = job, time.monotonic(), False
        self.asked: float | None = None  # when it was asked to stop
        self.code: int | None = None
        self.process: Popen[bytes] | None = None
        run_dir = job.to_resume()
        words = job.command(run_dir)
        job.state.status, job.state.error = "running", None
        job.state.done *= run_dir is not None
        job.keep()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w" if run_dir is None else "a") as log:
            if here is not None:
                program, *arguments = words[len(job.launcher) - 1 :]
                self.code = _call(here, (program.rpartition(".")[2], *arguments), log)
                return
            # A session of its own: Ctrl-C reaches this process alone, which sends SIGTERM.
            held = (lock.fileno(),)
            self.process = Popen(words, stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=held)

    def poll(self) -> int | None:
        """Return the exit code; None: it runs. A training that takes too long to stop is killed."""
        if self.process is not None:
            if self.asked is not None and time.monotonic() - self.asked > GRACE_S:
                self.end()
            self.code = self.process.poll()
        return self.code

    def stop(self, kill: bool = False) -> None:
        """Ask the training to save a checkpoint and end."""
        if self.process is not None and self.process.poll() is None:
            if self.asked is None:
                self.asked = time.monotonic()
                self.process.terminate()
            if kill:
                self.end()

    def end(self) -> None:
        """Kill what is left of the training's session."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.code = self.process.wait()


def _call(here: Callable[..., int], words: Sequence[str], log: IO[str]) -> int:
    """Run a training in this process: Python does not start again, but nothing can kill the training alone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(log), redirect_stderr(log):
            return here(*words)
    except SystemExit as end:  # it was asked to stop, and has saved
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:  # a failed training does not end the batch
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=log)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the numbers of Ctrl-C and SIGTERM in a list."""
    signals: list[int] = []

    def note(number: int, _: Any) -> None:
        signals.append(number)
        if signal.getsignal(signal.SIGTERM) is not note:  # a training in this process has its own handler
            signal.raise_signal(signal.SIGTERM)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
