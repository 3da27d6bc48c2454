"""The runs of a table, rows x seeds, each an ordinary training.

    <runs_dir>/tables/<table>-<scale>/   runs/<row>-seed<s>/<stamp>-.../   run directories
                                         lock  states/  logs/              experiments/studies/job.py

Rows see the same data in the same order: they share everything but `model`, `moe`, `schedule`, an extension's `options`
and the learning rate, which a search may have chosen for each architecture. A weight's initial value depends on its
name and the seed, so what two rows have in common starts with equal values. A run counts as this table's only if its
config is the same as it would be now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

from scmoe.config import registry
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten
from scmoe.config.load import load, to_yaml
from scmoe.experiments.studies.digest import digest_of
from scmoe.experiments.studies.job import Job, State
from scmoe.experiments.studies.table.rows import Row, Scale, Table
from scmoe.runs.seen import SeenRun, flat

OWN = ("model.", "moe.", "schedule.", "optim.lr", "options", "name")  # keys in which rows may differ


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

    @cached_property
    def digest(self) -> str:
        return digest_of(self.config)


def plan_runs(table: Table, scale: Scale, folder: Path, seeds: int, overrides: Sequence[str] = ()) -> list[Run]:
    """Return all runs of a table, seed by seed, so that an interrupted table has whole comparisons in it.

    Raises ConfigError for a row that would not see the same training as the others, and for an override of what rows,
    or the table, set themselves.
    """
    set_here = [*(row.overrides for row in table.rows), *scale.settings.values()]
    own_keys = {"name", "seed", *(word.partition("=")[0] for words in set_here for word in words)}
    for word in overrides:
        if (key := word.removeprefix("--").partition("=")[0]) in own_keys:
            raise ConfigError(f"{word} is given, allowed: keys other than {key}, which each run of a table sets itself")
    runs = []
    for number, (seed, row) in enumerate(product(range(1, seeds + 1), table.rows), 1):
        name = f"{row.slug}-seed{seed}"
        setting = scale.settings[row.setting] if row.setting is not None else ()
        group = f"logger.group={folder.name}"  # of W&B; overrides may name another one
        own_words = f"name={name}", f"seed={seed}", f"runs_dir={folder / 'runs'}"
        words = (*setting, *row.overrides, group, *overrides, *own_words)
        config = load(scale.config, words)
        title = f"run {number} of {seeds * len(table.rows)} ({row.name}, seed {seed})"
        own = partial(same_config, config=config)
        again = registry.words(config.extensions, config.callbacks)
        job = Job(name, title, folder, folder / "runs" / name, [str(scale.config), *words], again=again, is_own=own)
        runs.append(Run(row, seed, config, job))
    first = flatten(runs[0].config)
    for run in runs[: len(table.rows)]:
        for key, value in flatten(run.config).items():
            if value != first[key] and not key.startswith(OWN):
                raise ConfigError(
                    f"row {run.row.name!r} sets {key}, allowed: keys that begin with {', '.join(OWN[:-1])}"
                )
    return runs


def read_states(runs: Sequence[Run]) -> None:
    """Set the runs' states from their files; a state that belongs to a run of another config counts as none."""
    for run in runs:
        state = run.job.read()
        if state.status == "finished" and state.results.get("digest") == run.digest:
            continue
        if state.run_dir and Path(state.run_dir) not in run.job.run_dirs():
            run.job.state = State()
        elif state.status == "finished":  # it does not hold what is kept today: its result is read again
            run.job.state = State("cut", state.run_dir, state.seconds) if state.run_dir else State()


def same_config(run_dir: Path, config: Config) -> bool:
    """Is this a run of this config, wherever it is logged? A newer field than the run counts unless at its default."""
    was = SeenRun(run_dir).config
    return all(was[key] == value for key, value in flat(to_yaml(config)).items() if not key.startswith("logger."))
