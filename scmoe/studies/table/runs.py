"""The runs of a table, rows x seeds, each an ordinary training.

    <runs_dir>/tables/<table>-<scale>/   runs/<row>-seed<s>/<stamp>-.../   run directories
                                         lock  states/  logs/              studies/job.py

Rows see the same tokens in the same order: they share everything but `model`, `moe` and `schedule`. A weight's initial
value depends on its name and the seed, so what two rows have in common starts with equal values. A run counts as this
table's only if its config is the same as it would be now.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from scmoe.config.fields import Config, ConfigError, flatten
from scmoe.config.load import load, to_yaml
from scmoe.studies.batch import Batch
from scmoe.studies.job import Job, State, lock_of
from scmoe.studies.progress import Watch
from scmoe.studies.runs import SeenRun, flat
from scmoe.studies.table.rows import Row, Scale, Table

OWN = ("model.", "moe.", "schedule.", "name")  # keys in which rows may differ


@dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed."""

    row: Row
    seed: int
    config: Config
    job: Job

    @property
    def state(self) -> State:
        return self.job.state


def plan_runs(table: Table, scale: Scale, folder: Path, seeds: int, overrides: Sequence[str] = ()) -> list[Run]:
    """Return all runs of a table, seed by seed, so that an interrupted table has whole comparisons in it.

    Raises ConfigError for a row that would not see the same training as the others.
    """
    runs = []
    for number, (seed, row) in enumerate(product(range(1, seeds + 1), table.rows), 1):
        name = f"{row.slug}-seed{seed}"
        words = (*row.overrides, *overrides, f"name={name}", f"seed={seed}", f"runs_dir={folder / 'runs'}")
        config = load(scale.config, words)
        title = f"run {number} of {seeds * len(table.rows)} ({row.name}, seed {seed})"
        own = partial(same_config, config=config)
        job = Job(name, title, folder, folder / "runs" / name, [str(scale.config), *words], is_own=own)
        runs.append(Run(row, seed, config, job))
    first = flatten(runs[0].config)
    for run in runs[: len(table.rows)]:
        for key, value in flatten(run.config).items():
            if value != first[key] and not key.startswith(OWN):
                raise ConfigError(f"row {run.row.name!r} sets {key}, allowed: {', '.join(OWN[:-1])} keys of the model")
    return runs


def run_all(runs: Sequence[Run], jobs: int, metric: str, train_here: Callable[[list[str]], int]) -> int:
    """Run what is not finished, `jobs` in parallel (0: all in this process). Returns the signal that stopped it, or 0.

    Failed runs are tried again. Raises ConfigError where another process runs this table.
    """

    def judge(job: Job) -> None:
        """A run without the metric in its summary has failed."""
        done = next((run for run in map(SeenRun, job.run_dirs()) if run.summary), None)
        if done and isinstance(done.summary.get(metric), (int, float)):
            job.state.run_dir, job.state.results = str(done.path), done.summary
        else:
            job.state.status, job.state.error = "failed", f"it ended without {metric} in its summary"

    def result(job: Job) -> str:
        return f"{metric} {job.state.results[metric]:.4f}" if job.state.results else "the same command resumes it"

    watch = Watch(result)
    with lock_of(runs[0].job.study) as lock, watch.bar:
        read_states(runs)
        if finished := sum(run.state.status == "finished" for run in runs):
            watch.say(f"{finished} of {len(runs)} runs are finished already")
        batch = Batch([run.job for run in runs], jobs, len(runs), watch, judge=judge, train_here=train_here)
        return batch.run(lock, again=("waiting", "cut", "failed"))


def read_states(runs: Sequence[Run]) -> None:
    """Set the runs' states from their files; a state that belongs to a run of another config counts as none."""
    for run in runs:
        state = run.job.read()
        if state.run_dir and Path(state.run_dir) not in run.job.run_dirs():
            run.job.state = State()


def same_config(run_dir: Path, config: Config) -> bool:
    """Is this a run of this config? A field that is newer than the run counts unless it is at its default."""
    was = SeenRun(run_dir).config
    return all(was[key] == value for key, value in flat(to_yaml(config)).items())
