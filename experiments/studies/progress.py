"""The progress of a batch on standard error: a bar on a terminal; elsewhere a line for each job and one a minute."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from scmoe.experiments.studies.batch import Batch
from scmoe.experiments.studies.job import Job

SAY_EVERY_S = 60.0


class Watch:
    """A batch's `watch`; enter its `bar`. result: the text of an ended job. note: the text at the end of the bar."""

    def __init__(self, result: Callable[[Job], str], note: Callable[[], str] = lambda: "") -> None:
        self.result, self.note, self.said = result, note, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}/{task.total}"))
        facts = (TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"))
        screen = Console(file=sys.stderr)  # this one, also while a training in this process prints into its log
        self.bar = Progress(*columns, *facts, console=screen, disable=not screen.is_terminal)
        self.task = self.bar.add_task("", total=None, left="", note="")

    def __call__(self, batch: Batch, ended: Job | None) -> None:
        seconds = batch.seconds_left()
        left = f"about {clock(seconds)} left" if seconds else ""
        self.bar.update(self.task, completed=batch.done(), total=batch.total, left=left, note=self.note())
        if ended:
            facts = [ended.state.error or self.result(ended), clock(ended.state.seconds), left]
            self.say(f"{ended.title} {ended.state.status}: {', '.join(filter(None, facts))}")
        elif self.bar.disable and time.monotonic() - self.said > SAY_EVERY_S:
            of = f" of {batch.total}" if batch.total else ""
            self.say(f"{batch.done():.1f}{of} done{', ' if left else ''}{left}")

    def say(self, line: str) -> None:
        self.said = time.monotonic()
        self.bar.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
