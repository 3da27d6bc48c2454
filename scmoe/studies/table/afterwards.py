"""What a table does after its trainings: evaluate its runs, and measure speeds on the testbed, one after the other.

Each is a job with a state and a log like a training's. A speed is measured last and alone, since other work on the
machine would change it. <table's folder>/speed/ has the reports of `bench overlap`, one for each share of
communication.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from scmoe.studies.batch import Batch
from scmoe.studies.job import Job
from scmoe.studies.progress import Watch
from scmoe.studies.table.kept import look_up
from scmoe.studies.table.rows import Scale, Table
from scmoe.studies.table.runs import Run

EVALUATE = (sys.executable, "-m", "scmoe.experiments.evaluate")
BENCH = (sys.executable, "-m", "scmoe.experiments.bench")
AGAIN = ("waiting", "cut", "failed")


def evaluate_all(
    runs: Sequence[Run], table: Table, scale: Scale, lock: IO[str], jobs: int, here: Callable[..., int]
) -> tuple[list[Job], int]:
    """Evaluate the finished runs that lack a metric of an evaluation. here: as of Batch, for jobs=0.

    The results for the run's last checkpoint go into its state. Returns the evaluations' jobs, of which failed ones say
    why, and the signal that stopped them, or 0.
    """
    needed = [key for metric in table.metrics_from("evaluation") for key in metric.keys]
    if scale.evaluate is None or not needed:
        return [], 0
    of: dict[Job, Run] = {}
    for run in runs:
        done = run.state.results.get("evaluated_by") == list(scale.evaluate)
        if run.state.status == "finished" and not (done and _has(run.state.results.get("evaluation"), needed)):
            name, run_dir = f"{run.job.name}-evaluation", run.state.run_dir or "no-run-directory-on-this-machine"
            title = f"evaluation of {run.row.name}, seed {run.seed}"
            words = [run_dir, *scale.evaluate]
            job = Job(name, title, run.job.study, run.job.study / "no-run-of-an-evaluation", words, EVALUATE)
            of[job] = run

    def judge(job: Job) -> None:
        run = of[job]
        path = Path(job.arguments[0]) / "evaluation.json"  # an entry for each checkpoint
        entries = json.loads(path.read_text()) if path.exists() else {}
        found: dict[str, Any] = max(entries.values(), key=lambda entry: entry["step"], default={})
        if _has(found, needed):
            run.state.results |= {"evaluation": found, "evaluated_by": job.arguments[1:]}
            run.job.keep()
        else:
            missing = [key for key in needed if look_up(found, key) is None]
            job.state.status, job.state.error = "failed", f"it ended without {', '.join(missing)} in evaluation.json"

    return list(of), _run(list(of), lock, jobs, judge, here)


def measure_speeds(table: Table, scale: Scale, folder: Path, lock: IO[str]) -> tuple[list[Job], int]:
    """Measure the rows' speeds at every share of the table, unless it was done by the same command before.

    Returns the jobs, of which failed ones say why, and the signal that stopped them, or 0.
    """
    if scale.bench is None:
        return [], 0
    rows = dict.fromkeys(["top2", *(row.speed for row in table.rows if row.speed)])
    jobs = []
    for share in table.shares if scale.shares is None else scale.shares:
        name = f"speed-{share:g}"
        words = ["overlap", "--share", f"{share:g}", "--rows", *rows, "--out", str(folder / "speed"), *scale.bench]
        job = Job(name, f"speed at a share of {share:g}", folder, folder / "no-run-of-a-measurement", words, BENCH)
        if job.read().results != {"command": words} or share not in read_speeds(folder):
            job.state.status = "waiting"
            for old in (folder / "speed").glob(f"*-share-{share:g}.*"):  # its name holds what was measured
                old.unlink()
        jobs.append(job)

    def judge(job: Job) -> None:
        job.state.results = {"command": list(job.arguments)}

    return jobs, _run(jobs, lock, 1, judge, None)


def read_speeds(folder: Path) -> dict[float, dict[str, Any]]:
    """Return the reports of `bench overlap` by share, as its files in <folder>/speed/ are named."""
    found = {}
    for path in sorted((folder / "speed").glob("*-share-*.json")):
        found[float(path.stem.rpartition("-share-")[2])] = json.loads(path.read_text())
    return found


def _has(found: Any, needed: Sequence[str]) -> bool:
    return all(look_up(found, key) is not None for key in needed)


def _run(
    jobs: list[Job], lock: IO[str], slots: int, judge: Callable[[Job], None], here: Callable[..., int] | None
) -> int:
    watch = Watch(lambda job: "")
    with watch.bar:
        return Batch(jobs, slots, len(jobs), watch, judge=judge, here=here).run(lock, again=AGAIN)
