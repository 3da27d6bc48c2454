"""A table from beginning to end: its trainings and evaluations, its speeds, then its files."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from experiments.tables.evaluations import Evaluations, missing
from experiments.tables.table_file import TableOptions, load_table
from experiments.tables.table_plan import TablePlan, plan_table
from experiments.tables.table_report import write_report
from experiments.tables.table_runs import Run, finished, kept_results, look_up, read_states, save
from experiments.tables.table_speeds import AGAIN, measure_speeds
from scmoe.config.leaves import ConfigError
from scmoe.report import say
from scmoe.runs.seen import SeenRun
from scmoe.sweeps.batch import BatchProgress, JobBatch
from scmoe.sweeps.jobs import State, StudyJob, clock, hold_lock

RESUMES = "the same command resumes it"


@dataclass
class TableOutcome:
    """How the making of a table ended: numbers of trainings.

    failed: counts evaluations, measurements and the report too. signal: the one that stopped it, or
    0. has_report: whether the report is that of these runs; without one, the files of earlier runs
    may be there.
    """

    finished: int = 0
    failed: int = 0
    cut: int = 0
    signal: int = 0
    rows: int = 0  # with at least one finished run
    has_report: bool = False


def make_table(plan: TablePlan) -> TableOutcome:
    """Do what is left of a table and write its files. The same call resumes a stopped one."""
    table, runs = plan.table, plan.runs
    evaluations = Evaluations(table, plan.scale)
    speeds: list[StudyJob] = []
    with hold_lock(plan.folder) as lock:
        read_usable_states(runs, evaluations)
        evaluations.check_data(runs)
        signal = make_runs(runs, lock, plan.jobs, table.summary_keys, evaluations)
        if not signal:
            speeds, signal = measure_speeds(table, plan.scale, plan.folder, lock)

    outcome = outcome_of(runs, [*evaluations.jobs, *speeds], signal)
    is_possible = write_files(plan)
    outcome.failed += not is_possible
    outcome.has_report = is_possible and outcome.finished > 0
    if signal:
        say(f"stopped; {RESUMES}")
    return outcome


def read_usable_states(runs: Sequence[Run], evaluations: Evaluations) -> None:
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


def make_runs(
    runs: Sequence[Run], lock: IO[str], jobs: int, needed: Sequence[str], evaluations: Evaluations
) -> int:
    """Train and evaluate what is not finished, `jobs` in parallel (0: all in this process).

    needed: keys of the summary without which a training has failed. What failed is tried again.
    Return the signal that ended it, or 0. The caller has read the states and holds the lock.
    """

    def judge(job: StudyJob, run: Run) -> StudyJob | None:
        newest = next((seen for seen in map(SeenRun, job.run_dirs()[:1]) if seen.summary), None)
        lacks = missing(needed, newest and newest.summary)
        if newest is None or lacks:
            job.fail(f"it ended without a finite {', '.join(lacks)} in its summary")
            return None
        job.state.run_dir = str(newest.path)
        job.state.results = kept_results(newest, run.digest)
        return evaluations.job(run)

    def result(job: StudyJob) -> str:
        if job in evaluations.jobs:
            return ""
        summary = job.state.results.get("summary")
        if not summary:
            return RESUMES
        return ", ".join(f"{key} {look_up(summary, key):.4f}" for key in needed)

    for run in runs:
        run.job.judge = partial(judge, run=run)
    done = finished(runs)
    first = [job for run in done if (job := evaluations.job(run))]
    total = len(runs) + len(first)
    if evaluations.needed:
        total += len(runs) - len(done)
    watch = BatchProgress(result)
    with watch.bar:
        if done:
            watch.say(f"{len(done)} of {len(runs)} runs are finished already")
        return JobBatch([*first, *(run.job for run in runs)], jobs, total, watch).run(lock, AGAIN)


def outcome_of(runs: Sequence[Run], others: Iterable[StudyJob], signal: int) -> TableOutcome:
    """Count the runs and other jobs that finished, failed or were stopped; say why some failed."""
    jobs = [*(run.job for run in runs), *others]
    failed = [job for job in jobs if job.state.status == "failed"]
    for job in failed:
        say(f"failed: {job.title}: {job.state.error}; its log: {job.log}")
    done = finished(runs)
    cut = sum(job.state.status == "cut" for job in jobs)
    rows = {run.row.name for run in done}
    return TableOutcome(len(done), len(failed), cut, signal, len(rows))


def write_files(plan: TablePlan) -> bool:
    """Write the files of a table that has a finished run, and return whether a report was possible.

    There is none over runs that have read different data.
    """
    done = finished(plan.runs)
    if others := paths_of_other_data(done):
        paths = " ".join(map(str, others))
        say(
            "failed: the report, as runs have read different data. To train again what has read"
            f" other data than the newest run, remove {paths}"
        )
        return False
    if done:
        files = write_report(plan.table, plan.scale_name, plan.runs, plan.command)
        if plan.options.to is not None:
            files.append(save(plan.runs, plan.options.to))
        for path in files:
            say(str(path))
    return True


def paths_of_other_data(done: Sequence[Run]) -> list[Path]:
    """Return the state files and run directories of runs that have read other data than the newest
    one. A state without its run directory is made of that directory again. The kept states of
    Tables 1 and 7 note no data."""
    noted = [run for run in done if run.state.results.get("data")]
    newest = max(noted, key=lambda run: run.job.state_file.stat().st_mtime, default=None)
    return [
        path
        for run in noted
        if newest and run.state.results["data"] != newest.state.results["data"]
        for path in (run.job.state_file, *run.job.run_dirs())
    ]


def make_tables(
    names: Sequence[str], options: TableOptions, overrides: Sequence[str]
) -> dict[str, Any]:
    """Make tables in turn. Return {tables: rows with a result by number, failed, cut, seconds,
    signal}.

    Each table's file states its minutes; the time left is corrected by the time that the earlier
    tables took. Raises ConfigError for an error in the options or in a table's file before anything
    starts.
    """
    plans = [plan_table(load_table(name), options, overrides) for name in dict.fromkeys(names)]
    costs = [cost_of(plan) for plan in plans]
    total = TableOutcome()
    rows: dict[str, int] = {}
    started = time.monotonic()
    for i, plan in enumerate(plans):
        before, left = sum(costs[:i]), sum(costs[i:])
        if left:
            ratio = (time.monotonic() - started) / before if before else 1.0  # to the stated time
            say(f"{len(plans) - i} of {len(plans)} tables to do, about {clock(left * ratio)} left")
        say(plan.table.title)
        try:
            outcome = make_table(plan)
            rows[plan.table.name.removeprefix("table")] = outcome.rows
        except ConfigError as error:  # such as another process in this table's folder
            say(f"failed: {plan.table.name}: {error}")
            outcome = TableOutcome(failed=1)
        total.failed += outcome.failed
        total.cut += outcome.cut
        total.signal = outcome.signal
        if outcome.signal:
            break
    return {
        "tables": rows,
        "failed": total.failed,
        "cut": total.cut,
        "seconds": round(time.monotonic() - started, 1),
        "signal": total.signal,
    }


def cost_of(plan: TablePlan) -> float:
    """Return the seconds that a table will take, as its file states them, and say what is to do."""
    read_states(plan.runs)
    to_do = len(plan.runs) - len(finished(plan.runs))
    seconds = 60 * plan.scale.minutes * to_do / (len(plan.table.rows) * plan.scale.seeds)
    about = f", about {clock(seconds)}" if seconds else ""
    rows = f"{len(plan.runs)} runs of {len(plan.table.rows)} rows"
    say(f"{plan.table.name} at {plan.scale_name}: {rows}{about}, in {plan.folder}")
    return seconds
