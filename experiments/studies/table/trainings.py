"""A table's work on its runs: their trainings, each followed by its evaluation, in one batch."""

from collections.abc import Callable, Sequence
from typing import IO

from scmoe.experiments.studies.batch import Batch
from scmoe.experiments.studies.job import Job
from scmoe.experiments.studies.progress import Watch
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.kept import look_up, results_of
from scmoe.experiments.studies.table.table_runs import Run
from scmoe.runs.seen import SeenRun


def make_runs(
    runs: Sequence[Run],
    lock: IO[str],
    jobs: int,
    needed: Sequence[str],
    evaluations: Evaluations,
    here: Callable[..., int],
) -> int:
    """Train and evaluate what is not finished, `jobs` in parallel (0: all in this process).

    needed: keys of the summary without which a training has failed. What failed is tried again. Returns the signal that
    ended it, or 0. The caller has read the states and holds the lock.
    """
    by_job = {run.job: run for run in runs}

    def judge(job: Job) -> Job | None:
        if job in evaluations.of:
            evaluations.judge(job)
            return None
        done = next((run for run in map(SeenRun, job.run_dirs()) if run.summary), None)
        missing = [key for key in needed if done is None or look_up(done.summary, key) is None]
        if not done or missing:
            why = f"it ended without a finite {', '.join(missing)} in its summary"
            job.state.status, job.state.error = "failed", why
            return None
        job.state.run_dir, job.state.results = str(done.path), results_of(done, by_job[job].digest)
        return evaluations.job(by_job[job])

    def result(job: Job) -> str:
        if job in evaluations.of:
            return ""
        summary = job.state.results.get("summary")
        if not summary:
            return "the same command resumes it"
        return ", ".join(f"{key} {look_up(summary, key):.4f}" for key in needed)

    finished = [run for run in runs if run.state.status == "finished"]
    first = [job for run in finished if (job := evaluations.job(run))]
    total = len(runs) + len(first) + evaluations.wanted * (len(runs) - len(finished))
    watch = Watch(result)
    with watch.bar:
        if finished:
            watch.say(f"{len(finished)} of {len(runs)} runs are finished already")
        batch = Batch([*first, *by_job], jobs, total, watch, judge=judge, here=here)
        return batch.run(lock, again=("waiting", "cut", "failed"))
