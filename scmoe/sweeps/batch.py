"""Runs many trainings as one batch, each in a process of its own or all in this one.

A batch can be stopped at any time. It skips finished jobs, resumes interrupted ones from their
newest checkpoint, marks failed ones and continues with the rest. Ctrl-C and SIGTERM reach every
training as SIGTERM: it saves a checkpoint and ends. What differs between studies is handed in:
which job comes next, and what a training's result is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from subprocess import DEVNULL, Popen
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from scmoe.command_line import call
from scmoe.sweeps.jobs import StudyJob, clock, last_line

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# exit codes of a training that was asked to stop, with the signal
STOPPED = {code: number for number in STOP_SIGNALS for code in (128 + number, -number)}
STOP_GRACE_S = 60.0  # time for a training that is asked to stop, to write its checkpoint
POLL_S = 0.1
SAY_EVERY_S = 60.0  # where there is no terminal


@dataclass
class JobBatch:
    """Jobs to run, `slots` in parallel (0: one after the other in this process).

    jobs: those known so far. propose: returns the next one after them, or None. look: reads the
    results of a job that runs or has ended. watch: is called now and then, and with
    each job that has ended. total: how many jobs there will be, None: unlimited.
    """

    jobs: list[StudyJob]
    slots: int
    total: int | None
    watch: Callable[[JobBatch, StudyJob | None], None]
    propose: Callable[[], StudyJob | None] = lambda: None
    look: Callable[[StudyJob], None] = lambda job: None
    waiting: list[StudyJob] = field(default_factory=list)

    def run(self, lock: IO[str], again: Sequence[str] = ("waiting", "cut")) -> int:
        """Run the jobs whose status is in `again`, then the proposed ones. Return the signal that
        stopped it, or 0."""
        for begun in [job for job in self.jobs if job.state.status in again]:
            newest = begun.run_dirs()[:1]  # an older one may have ended long ago
            if begun.state.status == "cut" and any(
                (path / "summary.json").exists() for path in newest
            ):
                # it ended after the process that had started it was killed
                self._settle(begun, code=0)
            else:
                self.waiting.append(begun)
        running: list[Running] = []
        with _stop_requests() as signals:
            try:
                while True:
                    while (
                        not signals and len(running) < max(1, self.slots) and (job := self._next())
                    ):
                        running.append(Running(job, lock, here=self.slots == 0))
                    if not running:
                        return signals[0] if signals else 0
                    self._follow(running, signals)
            # after an error of this process, such as a full disk: no training may outlive it
            finally:
                for one in running:
                    one.stop(kill=True)
                for one in running:
                    with suppress(OSError):
                        self._close(one)

    def _follow(self, running: list[Running], signals: list[int]) -> None:
        """Close the trainings that have ended, and stop those that must not go on."""
        for one in [one for one in running if one.poll() is not None]:
            self._close(one)
            running.remove(one)
            if self.slots == 0 and one.job.state.status == "cut":
                signals.append(STOPPED.get(one.code or 0, signal.SIGTERM))
        for one in running:
            if signals:
                one.stop(kill=len(signals) > 1)
            self.look(one.job)
        if running:
            self.watch(self, None)
            time.sleep(POLL_S)

    def seconds_left(self) -> float | None:
        """Estimate from this session's progress; None: nothing to estimate from.

        The time before a training's first line is that of its start, which must not count as time
        of steps.
        """
        moved = [job for job in self.jobs if job.progress > job.begun_progress]
        progress = sum(job.progress - job.begun_progress for job in moved)
        if self.total is None or progress < 0.01:
            return None
        job_s = sum(job.worked_s - job.begun_s for job in moved) / progress
        starts = [max(0.0, job.begun_s - job_s * job.begun_progress) for job in moved]
        start_s = sum(starts) / len(moved)
        begun = sum(job.state.status == "running" or job.state.has_ended for job in self.jobs)
        seconds = (self.total - self.done()) * job_s + max(0, self.total - begun) * start_s
        return seconds / max(1, self.slots)

    def done(self) -> float:
        """Return how many jobs are done; a part of one counts."""
        ended = [job for job in self.jobs if job.state.has_ended and job not in self.waiting]
        return len(ended) + sum(job.state.done for job in self.jobs if job not in ended)

    def _next(self) -> StudyJob | None:
        return self.waiting.pop(0) if self.waiting else self.propose()

    def _close(self, one: Running) -> None:
        one.end()
        before = one.job.state.done
        self._settle(one.job, one.code, one.asked is not None)
        if one.job.state.status == "finished":
            one.job.progress += 1 - before
        self.watch(self, one.job)

    def _settle(self, job: StudyJob, code: int | None, asked: bool = False) -> None:
        """Set and keep the state of a training that ended with this exit code."""
        run_dirs, state = job.run_dirs(), job.state
        state.run_dir = str(run_dirs[0]) if run_dirs else None
        state.seconds = round(state.seconds, 1)
        self.look(job)
        if code == 0:
            state.status, state.done = "finished", 1.0
            if following := job.judge(job):
                self.jobs.append(following)
                self.waiting.insert(0, following)
        elif code in STOPPED or asked:  # a launcher ends with a code of its own
            state.status = "cut"
        else:
            job.fail(f"exit code {code}: {last_line(job.log)}")
        job.keep()


class Running:
    """A job whose training runs in a process of its own, or has run in this one."""

    def __init__(self, job: StudyJob, lock: IO[str], here: bool) -> None:
        self.job, self.seen = job, time.monotonic()
        self.asked: float | None = None  # when it was asked to stop
        self.code: int | None = None
        self.process: Popen[bytes] | None = None
        run_dir = job.to_resume()
        words = job.command(run_dir)
        job.state.status, job.state.error = "running", None
        if run_dir is None:
            job.state.done = 0.0
        job.keep()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w" if run_dir is None else "a", encoding="utf-8") as log:
            if here:
                self.code = _call(words[len(job.launcher) - 1 :], log)
                return
            # A session of its own: Ctrl-C reaches this process alone, which sends SIGTERM.
            held = (lock.fileno(),)
            self.process = Popen(
                words, stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=held
            )

    def poll(self) -> int | None:
        """Note how far the training is. Return its exit code; None: it runs. It is killed if it is
        slow to stop."""
        seen = time.monotonic()
        if self.process is not None:
            if self.asked is not None and seen - self.asked > STOP_GRACE_S:
                self.end()
            self.code = self.process.poll()
        self.job.advance(seen - self.seen)
        self.seen = seen
        return self.code

    def stop(self, kill: bool = False) -> None:
        """Ask the training to save a checkpoint and end. kill: do not wait for it."""
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


def _call(words: Sequence[str], log: IO[str]) -> int:
    """Run a training in this process: Python does not start again, but nothing can kill the
    training alone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(log), redirect_stderr(log):
            return call(*words)
    except SystemExit as end:  # it was asked to stop, and has saved
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:  # a failed training does not end the batch
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=log)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the numbers of Ctrl-C, SIGTERM and SIGHUP (a terminal that is gone) in a list. Under
    nohup SIGHUP stays ignored."""
    signals: list[int] = []

    def note(number: int, _: Any) -> None:
        signals.append(number)
        # a training in this process has its own handler
        if signal.getsignal(signal.SIGTERM) is not note:
            signal.raise_signal(signal.SIGTERM)

    before = {
        number: signal.signal(number, note)
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class BatchProgress:
    """Shows a batch on standard error: a bar on a terminal; elsewhere a line for each job and one a
    minute.

    It is a batch's `watch`; enter its `bar`. result: the text of an ended job. note: the text at
    the end of the bar.
    """

    def __init__(
        self, result: Callable[[StudyJob], str], note: Callable[[], str] = lambda: ""
    ) -> None:
        self.result = result
        self.note = note
        self.said = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f}{task.fields[of_total]}"),
        )
        facts = (
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}"),
        )
        # this stream, also while a training in this process prints into its log
        screen = Console(file=sys.stderr)
        self.bar = Progress(*columns, *facts, console=screen, disable=not screen.is_terminal)
        self.task = self.bar.add_task("", total=None, left="", note="", of_total="")

    def __call__(self, batch: JobBatch, ended: StudyJob | None) -> None:
        seconds = batch.seconds_left()
        left = f"about {clock(seconds)} left" if seconds else ""
        self.bar.update(
            self.task,
            completed=batch.done(),
            total=batch.total,
            of_total=f"/{batch.total}" if batch.total else "",
            left=left,
            note=self.note(),
        )
        if ended:
            facts = [ended.state.error or self.result(ended), clock(ended.state.seconds), left]
            self.say(f"{ended.title} {ended.state.status}: {', '.join(filter(None, facts))}")
        elif self.bar.disable and time.monotonic() - self.said > SAY_EVERY_S:
            total = f" of {batch.total}" if batch.total else ""
            self.say(f"{batch.done():.1f}{total} done{', ' if left else ''}{left}")

    def say(self, line: str) -> None:
        self.said = time.monotonic()
        self.bar.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
