"""A sweep of trainings, from W&B's own sweep file: `python -m experiments.sweep FILE [--local] [key=value ...]`.

With a W&B key the sweep is W&B's: it is created there, an agent is started here, and others may join from anywhere.
Without one, or with --local, the same file is run here, to be called again after a cut; the last line on standard
output is then `{"trials": .., "finished": .., "failed": .., "best": ..}`. Overrides go to every trial.
Exit codes: 2, the request was wrong and nothing was started; 1, no trial finished; 130 or 143, stopped.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.harness import clock
from experiments.runs import WIDTH
from experiments.sweep_config import Sweep, read
from experiments.sweep_report import rich_table, write_report
from experiments.sweep_search import Trial, best, total
from experiments.sweep_trials import Interrupted, kept, run_trials
from scmoe.config.fields import ConfigError

USAGE = "usage: python -m experiments.sweep FILE [--local] [key=value ...]\n"


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n{__doc__}")
        return 0 if arguments else 2
    local = "--local" in arguments
    path, *overrides = [word for word in arguments if word != "--local"]
    try:
        if wrong := [word for word in overrides if "=" not in word]:
            raise ConfigError(f"command line: {wrong[0]!r}, allowed: --local, key=value")
        sweep = read(path, overrides)
        if not local and _has_key():
            return run_online(sweep)
        again = shlex.quote(shlex.join(["--local", *overrides]))
        return run_here(sweep, f"make sweep CONFIG={shlex.quote(path)} ARGS={again}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _has_key() -> bool:
    from scmoe.training.run.wandb_logger import (
        has_wandb_key,  # here: a wrong file is answered without waiting for torch
    )

    return has_wandb_key()


# ---------------------------------------------------------------------- here


def run_here(sweep: Sweep, again: str) -> int:
    """again: the command that goes on where this one was stopped."""
    if sweep.method == "bayes" and find_spec("optuna") is None:
        raise ConfigError("method is bayes, allowed without optuna (pip install -e '.[sweep]'): grid | random")
    trials = kept(sweep)
    stopped = 0
    if done := sum(trial.state not in ("running", "cut") for trial in trials):
        print(f"{done} trials have ended already", file=sys.stderr)
    with _progress(sweep, trials) as watch:
        try:
            run_trials(sweep, trials, watch)
        except Interrupted as interrupted:
            stopped = 128 + interrupted.signum
    summary = write_report(sweep, trials)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(rich_table(sweep, trials))
    plain: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}  # a path may hold brackets
    console.print(f"results      {sweep.folder}", **plain)
    if summary["best"]:
        console.print(f"best         make train CONFIG={summary['best']['config']}", **plain)
    if stopped:
        console.print(f"go on        {again}", **plain)
    print(json.dumps(summary), flush=True)
    return stopped or (0 if summary["finished"] else 1)


class _Watch:
    """Tells of trials on standard error: a bar on a terminal, else a line when one has ended."""

    def __init__(self, sweep: Sweep, trials: list[Trial], bar: Progress | None) -> None:
        self.sweep, self.trials, self.bar, self.total = sweep, trials, bar, total(sweep)
        self.told = {trial.number for trial in trials if trial.state not in ("running", "cut")}
        self.task = bar.add_task("", total=self.total, left="", value="") if bar else None

    def __call__(self, trial: Trial) -> None:
        ended = trial.state != "running"
        part = 1.0 if ended else min(0.99, trial.steps / self.sweep.base.trainer.max_steps)
        progress = trial.number - 1 + part
        left = self.time_left(progress)
        if self.bar and self.task is not None:
            first = best(self.sweep, self.trials)
            value = f"best {first.value:.4g}" if first and first.value is not None else ""
            self.bar.update(self.task, completed=progress, left=left, value=value, description=f"trial {trial.number}")
        if ended and trial.number not in self.told:
            self.told.add(trial.number)
            result = "" if trial.value is None else f"{self.sweep.metric} {trial.value:.4f}"
            of = f" of {self.total}" if self.total else ""
            facts = [trial.reason or result, clock(trial.seconds), left]
            self.say(f"trial {trial.number}{of} {trial.state}: {', '.join(filter(None, facts))}")

    def time_left(self, progress: float) -> str:
        """From the mean of all trials so far, this one's part included."""
        spent = sum(trial.seconds for trial in self.trials)
        if self.total is None or progress < 0.05 or progress >= self.total:
            return ""
        return f"about {clock(spent / progress * (self.total - progress))} left"

    def say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(sweep: Sweep, trials: list[Trial]) -> Iterator[_Watch]:
    if not sys.stderr.isatty():
        yield _Watch(sweep, trials, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}/{task.total}"))
    told = (TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[value]}"))
    with Progress(*columns, *told, console=Console(stderr=True)) as bar:
        yield _Watch(sweep, trials, bar)


# ---------------------------------------------------------------------- with a key


# The agent calls `python`, which shall be this one, and keeps its notes in the folder of the sweep.
SETTINGS = 'PATH="$0:$PATH"; export PATH WANDB_DIR="$1"; shift; exec "$@"'


def run_online(sweep: Sweep) -> int:
    """Creates the sweep at W&B and runs an agent, which takes trials until the server has no more."""
    import wandb

    if (mode := sweep.base.logger.mode) not in ("auto", "online"):
        allowed = "with a key: auto | online; or --local"
        raise ConfigError(f"logger.mode is {mode!r}, W&B would see no trial, allowed {allowed}")
    project = sweep.raw.get("project", sweep.base.logger.project)
    try:
        entity = sweep.raw.get("entity") or wandb.Api().default_entity
        with redirect_stdout(sys.stderr):
            sweep_path = f"{entity}/{project}/{wandb.sweep(sweep.raw, entity, project)}"
    except (wandb.Error, OSError, ValueError) as error:  # ValueError: an answer that is none
        raise ConfigError(f"Weights & Biases takes no sweep, allowed here: --local: {error}") from error
    sweep.folder.mkdir(parents=True, exist_ok=True)
    given, join = sweep.folder / "sweep.yaml", f"PATH=$PWD/.venv/bin:$PATH wandb agent {sweep_path}"
    given.write_text(yaml.safe_dump(sweep.raw, sort_keys=False))
    print(f"the sweep was made at W&B as by:\n    wandb sweep --entity {entity} --project {project} {given}")
    print(f"agents may join from other machines, each in its copy of this folder, with:\n    {join}", flush=True)
    agent = [sys.executable, "-m", "wandb", "agent", "--forward-signals", sweep_path]
    places = [str(Path(sys.executable).parent), str(sweep.folder.absolute())]
    process = subprocess.Popen(["/bin/sh", "-c", SETTINGS, *places, *agent], start_new_session=True)
    stopped: list[int] = []

    def stop(signum: int, _: Any) -> None:
        stopped.append(signum)
        process.terminate()  # it tells its trial, which saves; told again, it waits no longer

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = process.wait()
    if stopped:
        code = 128 + stopped[0]
        print(f"go on        {join}")
    print(json.dumps({"sweep": sweep_path, "exit_code": code}), flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
