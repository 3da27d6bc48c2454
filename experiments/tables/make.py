"""Tables from beginning to end: their trainings, evaluations and speeds, then their files.

A run is evaluated right after its training, and the results for its last checkpoint go into the
run's state. So a state that is kept, or committed, lacks nothing for which the run's weights would
be needed.

Speeds of architectures are measured on the testbed, last and alone, since other work on the machine
would change them. <table's folder>/speed/ has the reports of `bench overlap`, one for each share of
communication.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import IO, Any

from experiments.bench.pairs import ROWS
from experiments.tables.results import read_speeds, share_of
from experiments.tables.table_file import Options, Scale, Table, load_table
from experiments.tables.table_report import write_report
from experiments.tables.table_runs import (
    Run,
    finished,
    look_up,
    plan_runs,
    read_states,
    results_of,
    save,
)
from scmoe.config import registry
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load
from scmoe.files.writing import read_json
from scmoe.report import say
from scmoe.runs.seen import SeenRun
from scmoe.sweeps.batch import Batch, Watch
from scmoe.sweeps.checks import refusal
from scmoe.sweeps.jobs import Job, State, clock, lock_of
from scmoe.training.assembly.data import build_datamodule

EVALUATE = (sys.executable, "-m", "scmoe", "evaluate")
BENCH = (sys.executable, "-m", "scmoe", "bench")
RESUMES = "the same command resumes it"
AGAIN = ("waiting", "cut", "failed")  # states of jobs that are made, or made again


@dataclass(frozen=True)
class Plan:
    """A table at a scale, with all its runs; nothing is started yet. overrides: of all runs."""

    table: Table
    scale_name: str
    options: Options
    overrides: Sequence[str]
    runs: list[Run]

    @property
    def scale(self) -> Scale:
        return self.table.scales[self.scale_name]

    @property
    def jobs(self) -> int:
        """Return the number of runs in parallel; 0: all in this process."""
        return self.scale.jobs if self.options.jobs is None else self.options.jobs

    @property
    def folder(self) -> Path:
        return self.runs[0].job.study

    @property
    def command(self) -> str:
        """The make command of this table, without runs_dir and --to."""
        seeds = len(self.runs) // len(self.table.rows)
        words = [
            word for word in self.overrides if not word.removeprefix("--").startswith("runs_dir=")
        ]
        if seeds != self.scale.seeds:
            words.insert(0, f"--seeds {seeds}")
        arguments = f' ARGS="{" ".join(words)}"' if words else ""
        return f"make table TABLE={self.table.name} SCALE={self.scale_name}{arguments}"


@dataclass
class Made:
    """The outcome of a table. failed: trainings, evaluations and measurements. signal: that stopped
    it, or 0."""

    finished: int = 0
    failed: int = 0
    cut: int = 0
    signal: int = 0
    rows: int = 0  # with at least one finished run


def plan_table(table: Table, options: Options, overrides: Sequence[str]) -> Plan:
    """Return the plan of a table at a scale that it has. Raises ConfigError for what cannot be
    honoured.

    Where the scale's data set is not on this machine, the plan is that of another scale, if the
    table names one.
    """
    for scale, row in product(table.scales.values(), table.rows):
        known = ROWS[2] | ROWS[1] if scale.bench is None else ROWS[every_of(scale.bench)]
        if row.speed is not None and row.speed not in known:
            raise refusal(f"{table.name}: speed of {row.name!r}", row.speed, " | ".join(known))
    name, scale = options.scale, table.scales[options.scale]
    config = load(scale.config, overrides)
    if scale.otherwise is not None:
        try:
            build_datamodule(config)
        except ConfigError as missing:
            say(f"{table.name} runs at scale {scale.otherwise}, not {name}: {missing}")
            name, scale = scale.otherwise, table.scales[scale.otherwise]
            config = load(scale.config, overrides)
    seeds = scale.seeds if options.seeds is None else options.seeds
    if seeds < 1 or (options.jobs or 0) < 0:
        raise ConfigError(
            f"--seeds is {seeds}, --jobs is {options.jobs}, allowed: 1 or more, 0 or more"
        )
    folder = Path(config.runs_dir) / "tables" / f"{table.name}-{name}"
    plan = Plan(table, name, options, overrides, plan_runs(table, scale, folder, seeds, overrides))
    if (to := options.to) is not None:
        if (to / folder.name).resolve() == folder.resolve():
            raise refusal(
                "--to", str(to), "a folder other than that of the tables, such as docs/results"
            )
    trainer = plan.runs[0].config.trainer
    if (
        plan.jobs == 0 and trainer.devices * trainer.num_nodes > 1
    ):  # Lightning would start this command again
        raise ConfigError(
            "--jobs is 0, allowed for runs of several ranks: 1 or more, as each needs its own"
            " processes"
        )
    return plan


def make_table(plan: Plan) -> Made:
    """Do what is left of a table and write its files. The same call resumes one that was stopped."""
    table, runs = plan.table, plan.runs
    evaluations = Evaluations(table, plan.scale)
    speeds: list[Job] = []
    with lock_of(plan.folder) as lock:
        _read_states(runs, evaluations)
        needed = dict.fromkeys(
            ["val_loss", *(key for m in table.metrics_from("summary") for key in m.keys)]
        )
        signal = make_runs(runs, lock, plan.jobs, [*needed], evaluations)
        if not signal:
            speeds, signal = measure_speeds(table, plan.scale, plan.folder, lock)
    jobs = [*(run.job for run in runs), *evaluations.jobs, *speeds]
    failed = [job for job in jobs if job.state.status == "failed"]
    for job in failed:
        say(f"failed: {job.title}: {job.state.error}; its log: {job.log}")
    done = finished(runs)
    cut, rows = sum(job.state.status == "cut" for job in jobs), {run.row.name for run in done}
    made = Made(len(done), len(failed), cut, signal, len(rows))
    if other := _of_other_data(done):
        made.failed += 1
        say(
            "failed: the report, as runs have read different data; remove"
            f" {' '.join(map(str, other))}"
        )
    elif done:
        files = write_report(table, plan.scale_name, runs, plan.command)
        if plan.options.to is not None:
            files.append(save(runs, plan.options.to))
        for path in files:
            say(str(path))
    if signal:
        say(f"stopped; {RESUMES}")
    return made


def _read_states(runs: Sequence[Run], evaluations: "Evaluations") -> None:
    """Set the states of runs from their files.

    A state that lacks an evaluation counts as none if the run's weights are gone.
    """
    read_states(runs)
    lost = [run for run in finished(runs) if not evaluations.can_use(run.state)]
    for run in lost:
        run.job.state = State()
    if lost:
        say(
            f"{len(lost)} finished runs are trained again: an evaluation is missing, and so are"
            " their weights"
        )


def _of_other_data(done: Sequence[Run]) -> list[Path]:
    """Return the state files of runs that have read other data than the newest one. Earlier
    versions noted no data."""
    noted = [run for run in done if run.state.results.get("data")]
    newest = max(noted, key=lambda run: run.job.state_file.stat().st_mtime, default=None)
    return [
        run.job.state_file
        for run in noted
        if newest and run.state.results["data"] != newest.state.results["data"]
    ]


def make_runs(
    runs: Sequence[Run], lock: IO[str], jobs: int, needed: Sequence[str], evaluations: "Evaluations"
) -> int:
    """Train and evaluate what is not finished, `jobs` in parallel (0: all in this process).

    needed: keys of the summary without which a training has failed. What failed is tried again.
    Returns the signal that ended it, or 0. The caller has read the states and holds the lock.
    """

    def judge(job: Job, run: Run) -> Job | None:
        done = next((seen for seen in map(SeenRun, job.run_dirs()) if seen.summary), None)
        lacks = missing(needed, done and done.summary)
        if done is None or lacks:
            job.fail(f"it ended without a finite {', '.join(lacks)} in its summary")
            return None
        job.state.run_dir, job.state.results = str(done.path), results_of(done, run.digest)
        return evaluations.job(run)

    def result(job: Job) -> str:
        if job in evaluations.jobs:
            return ""
        summary = job.state.results.get("summary")
        return (
            ", ".join(f"{key} {look_up(summary, key):.4f}" for key in needed)
            if summary
            else RESUMES
        )

    for run in runs:
        run.job.judge = partial(judge, run=run)
    done = finished(runs)
    first = [job for run in done if (job := evaluations.job(run))]
    total = len(runs) + len(first) + bool(evaluations.needed) * (len(runs) - len(done))
    watch = Watch(result)
    with watch.bar:
        if done:
            watch.say(f"{len(done)} of {len(runs)} runs are finished already")
        return Batch([*first, *(run.job for run in runs)], jobs, total, watch).run(lock, AGAIN)


def missing(keys: Sequence[str], found: Any) -> list[str]:
    """Return the dotted keys that do not lead to a number."""
    return [key for key in keys if look_up(found, key) is None]


class Evaluations:
    """Makes the evaluations' jobs and reads their results. `jobs` has those that were made."""

    def __init__(self, table: Table, scale: Scale) -> None:
        metrics = [] if scale.evaluate is None else table.metrics_from("evaluation")
        self.needed = [key for metric in metrics for key in metric.keys]
        self.words = list(scale.evaluate or ())
        self.jobs: list[Job] = []

    def lacking(self, state: State) -> bool:
        """Does a finished run lack a metric of an evaluation, or was it evaluated by another
        command?"""
        kept = state.results
        by_another = bool(self.needed) and kept.get("evaluated_by") != self.words
        return by_another or bool(missing(self.needed, kept.get("evaluation")))

    def can_use(self, state: State) -> bool:
        """Does a finished run lack nothing, or can it be evaluated here, because its weights are on
        this machine?"""
        weights = Path(state.run_dir).glob("checkpoints/*.ckpt") if state.run_dir else ()
        return not self.lacking(state) or any(weights)

    def job(self, run: Run) -> Job | None:
        """Return the job that evaluates a finished run; None: nothing is lacking.

        What another command has found is dropped, so that a table never compares two kinds of
        evaluation.
        """
        if not self.lacking(run.state):
            return None
        for key in ("evaluation", "evaluated_by"):
            run.state.results.pop(key, None)
        run.job.keep()
        name, study = f"{run.job.name}-evaluation", run.job.study
        title = f"evaluation of {run.row.name}, seed {run.seed}"
        words = [str(run.state.run_dir), *registry.words(run.config.extensions, {}), *self.words]
        self.jobs.append(
            Job(name, title, study, None, words, EVALUATE, judge=partial(self.judge, run=run))
        )
        return self.jobs[-1]

    def judge(self, job: Job, run: Run) -> None:
        """Put what a finished evaluation has found into the state of its run. It has failed if a
        metric is missing."""
        path = Path(job.arguments[0]) / "evaluation.json"  # an entry for each checkpoint
        found: dict[str, Any] = max(
            read_json(path).values(), key=lambda entry: entry["step"], default={}
        )
        if lacks := missing(self.needed, found):
            job.fail(f"it ended without a finite {', '.join(lacks)} in evaluation.json")
        else:
            run.state.results |= {"evaluation": found, "evaluated_by": self.words}
            run.job.keep()


def every_of(bench: Sequence[str]) -> int:
    """Return the option --every of words of `bench overlap`."""
    return 1 if re.search(r"--every[ =]1\b", " ".join(bench)) else 2


def measure_speeds(
    table: Table, scale: Scale, folder: Path, lock: IO[str]
) -> tuple[list[Job], int]:
    """Measure the rows' speeds at every share of the table, unless it was done by the same command
    before.

    Returns the jobs, of which failed ones say why, and the signal that stopped them, or 0.
    """
    if scale.bench is None:
        return [], 0

    def judge(job: Job) -> None:
        job.state.results = {"command": list(job.arguments)}

    rows = dict.fromkeys(["top2", *(row.speed for row in table.rows if row.speed)])
    jobs = []
    for share in table.shares if scale.shares is None else scale.shares:
        name, title = f"speed-{share:g}", f"speed at a share of {share:g}"
        words = [
            "overlap",
            "--share",
            f"{share:g}",
            "--rows",
            *rows,
            "--out",
            str(folder / "speed"),
            *scale.bench,
        ]
        job = Job(name, title, folder, None, words, BENCH, judge=judge)
        if job.read().results != {"command": words} or share not in read_speeds(table, folder):
            job.state.status = "waiting"
            for old in (folder / "speed").glob("*-share-*.*"):  # of other rows or options
                if share_of(old) == share:
                    old.unlink()
        jobs.append(job)
    watch = Watch(lambda job: "")
    with watch.bar:
        return jobs, Batch(jobs, 1, len(jobs), watch).run(lock, AGAIN)


def reproduce(names: Sequence[str], options: Options, overrides: Sequence[str]) -> dict[str, Any]:
    """Make tables in turn. Return {tables: rows with a result by number, failed, cut, seconds,
    signal}.

    Each table's file states its minutes; the time left is corrected by the time that the earlier
    tables took. Raises ConfigError for an error in the options or in a table's file before anything
    starts.
    """
    plans = [plan_table(load_table(name), options, overrides) for name in dict.fromkeys(names)]
    costs = []
    for plan in plans:
        read_states(plan.runs)
        to_do = len(plan.runs) - len(finished(plan.runs))
        costs.append(60 * plan.scale.minutes * to_do / (len(plan.table.rows) * plan.scale.seeds))
        about = f", about {clock(costs[-1])}" if costs[-1] else ""
        rows = f"{len(plan.runs)} runs of {len(plan.table.rows)} rows"
        say(f"{plan.table.name} at {plan.scale_name}: {rows}{about}, in {plan.folder}")
    found: dict[str, Any] = {"tables": {}, "failed": 0, "cut": 0, "seconds": 0.0, "signal": 0}
    started = time.monotonic()
    for i, plan in enumerate(plans):
        before, left = sum(costs[:i]), sum(costs[i:])
        ratio = (
            (time.monotonic() - started) / before if before else 1.0
        )  # of measured over stated time
        if left:
            say(f"{len(plans) - i} of {len(plans)} tables to do, about {clock(left * ratio)} left")
        say(plan.table.title)
        try:
            made = make_table(plan)
            found["tables"][plan.table.name.removeprefix("table")] = made.rows
        except ConfigError as error:  # such as another process in this table's folder
            say(f"failed: {plan.table.name}: {error}")
            made = Made(failed=1)
        found["failed"] += made.failed
        found["cut"] += made.cut
        found["signal"] = made.signal
        if made.signal:
            break
    found["seconds"] = round(time.monotonic() - started, 1)
    return found
