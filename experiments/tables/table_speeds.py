"""Speeds of a table's architectures, measured on the testbed.

They are measured last and alone, since other work on the machine would change them. <table's
folder>/speed/ has the reports of `bench overlap`, one for each share of communication.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from experiments.tables.table_file import PaperTable, Scale
from scmoe.predict.row_names import TWO, architecture_of
from scmoe.sweeps.batch import BatchProgress, JobBatch
from scmoe.sweeps.jobs import StudyJob

BENCH = (sys.executable, "-m", "scmoe", "bench")
AGAIN = ("waiting", "cut", "failed")  # states of jobs that are made, or made again


def measure_speeds(
    table: PaperTable, scale: Scale, folder: Path, lock: IO[str]
) -> tuple[list[StudyJob], int]:
    """Measure the rows' speeds at every share of the table, unless it was done by the same command
    before.

    Return the jobs, of which failed ones say why, and the signal that stopped them, or 0.
    """
    if scale.bench is None:
        return [], 0
    shares = table.shares if scale.shares is None else scale.shares
    jobs = [speed_job(table, scale.bench, folder, share) for share in shares]
    watch = BatchProgress(lambda job: "")
    with watch.bar:
        return jobs, JobBatch(jobs, 1, len(jobs), watch).run(lock, AGAIN)


def speed_job(table: PaperTable, bench: Sequence[str], folder: Path, share: float) -> StudyJob:
    """Return the job that measures a share, finished if the same command has done it before.

    Otherwise the report of the earlier command, which had other rows or options, is removed.
    """
    rows = rows_measured(table)
    out = folder / "speed"
    words = ["overlap", "--share", f"{share:g}", "--rows", *rows, "--out", str(out), *bench]

    def judge(job: StudyJob) -> None:
        job.state.results = {"command": list(job.arguments)}

    title = f"speed at a share of {share:g}"
    job = StudyJob(f"speed-{share:g}", title, folder, None, words, BENCH, judge=judge)
    if job.read().results != {"command": words} or share not in read_speeds(table, folder):
        job.state.status = "waiting"
        for old in out.glob("*-share-*.*"):
            if share_of(old) == share:
                old.unlink()
    return job


def read_speeds(table: PaperTable, folder: Path) -> dict[float, dict[str, Any]]:
    """Return the reports of `bench overlap` by share, as its files in <folder>/speed/ are named.
    One that lacks a row of the table is left out: it is to be measured again."""
    wanted = set(rows_measured(table))
    reports = {}
    for path in sorted((folder / "speed").glob("*-share-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if wanted <= report["rows"].keys():
            reports[share_of(path)] = report
    return reports


def rows_measured(table: PaperTable) -> list[str]:
    """Return the rows of the testbed: top-2 and those of the table, each with one batch in flight
    and, if the table compares losses at equal time, with two."""
    rows = dict.fromkeys(["top2", *(row.speed for row in table.rows if row.speed)])
    in_halves = [f"{architecture_of(row)}{TWO}" for row in rows] if table.equal_time else []
    return [*dict.fromkeys([*rows, *in_halves])]


def share_of(path: Path) -> float:
    """Return the share in the name of a report. More may follow it there, such as `-every-1`."""
    return float(path.stem.rpartition("-share-")[2].partition("-")[0])


def parse_every(bench: Sequence[str]) -> int:
    """Return the option --every of words of `bench overlap`."""
    return 1 if re.search(r"--every[ =]1\b", " ".join(bench)) else 2
