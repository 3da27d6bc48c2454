"""The speeds of a table's architectures, measured on the testbed.

A speed is measured last and alone, since other work on the machine would change it. Each measurement is a job with a
state and a log like a training's. <table's folder>/speed/ has the reports of `bench overlap`, one for each share of
communication.
"""

import json
import sys
from pathlib import Path
from typing import IO, Any

from scmoe.experiments.studies.batch import Batch
from scmoe.experiments.studies.job import Job
from scmoe.experiments.studies.progress import Watch
from scmoe.experiments.studies.table.rows import Scale, Table

BENCH = (sys.executable, "-m", "scmoe.experiments.bench")


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

    watch = Watch(lambda job: "")
    with watch.bar:
        return jobs, Batch(jobs, 1, len(jobs), watch, judge=judge).run(lock, again=("waiting", "cut", "failed"))


def read_speeds(folder: Path) -> dict[float, dict[str, Any]]:
    """Return the reports of `bench overlap` by share, as its files in <folder>/speed/ are named."""
    found = {}
    for path in sorted((folder / "speed").glob("*-share-*.json")):
        found[float(path.stem.rpartition("-share-")[2])] = json.loads(path.read_text())
    return found
