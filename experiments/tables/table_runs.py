"""The runs of a table, rows x seeds, each an ordinary training, and what is kept of them.

    <runs_dir>/tables/<table>-<scale>/   runs/<row>-seed<s>/<stamp>-.../   run directories
                                         lock  states/  logs/              scmoe/sweeps/jobs.py

Rows see the same data in the same order: they share everything but `model`, `moe`, `schedule`, an
extension's `options` and the learning rate, which a search may have chosen for each architecture. A
weight's initial value depends on its name and the seed, so what two rows have in common starts with
equal values. A run counts as this table's only if its config is the same as it would be now.

A state file has all that a report reads of a run, so it outlives the run's directory and its
machine. It also holds a digest of the run's config: a run of another digest is made again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments.tables.table_file import PaperTable, Scale, TableRow
from scmoe.config import registry
from scmoe.config.as_yaml import to_yaml
from scmoe.config.derived import max_steps
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten
from scmoe.config.load import load_config, sets
from scmoe.files import read_json, write_text_whole, write_whole
from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.parallel.checkpoint.state import META
from scmoe.runs.seen import SeenRun, flat
from scmoe.sweeps.checks import is_number
from scmoe.sweeps.jobs import NOT_IN_DIGEST, State, StudyJob, config_digest

# keys in which rows may differ
KEYS_OF_A_ROW = ("model.", "moe.", "schedule.", "optim.lr", "options", "name")


@dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed."""

    row: TableRow
    seed: int
    config: Config
    job: StudyJob

    @property
    def state(self) -> State:
        return self.job.state

    @cached_property
    def digest(self) -> str:
        return config_digest(self.config)

    @property
    def unit(self) -> str:
        return "images" if self.config.model.family == "swin" else "tokens"

    @property
    def seen(self) -> int:
        """Return how many images or tokens the whole run reads."""
        data = self.config.data
        samples = max_steps(self.config) * data.global_batch_size
        return samples if self.unit == "images" else samples * data.seq_len


def finished(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.state.status == "finished"]


def plan_runs(
    table: PaperTable, scale: Scale, folder: Path, seeds: int, overrides: Sequence[str] = ()
) -> list[Run]:
    """Return all runs of a table, seed by seed, so that an interrupted table has whole comparisons
    in it.

    Raises ConfigError for a row that would not see the same training as the others, and for an
    override of what rows, or the table, set themselves.
    """
    set_here = [*(row.overrides for row in table.rows), *scale.settings.values()]
    set_keys = {"name", "seed", *(word.partition("=")[0] for words in set_here for word in words)}
    for word, key in product(overrides, sorted(set_keys)):
        if sets(word, key):
            raise ConfigError(
                f"{word} is given, but the table sets {key} for each run itself. Change it in"
                " table.yaml"
            )
    runs = []
    all_seeds = range(scale.first_seed, scale.first_seed + seeds)
    for number, (seed, row) in enumerate(product(all_seeds, table.rows), 1):
        name = f"{row.slug}-seed{seed}"
        home = folder / "runs"
        setting = scale.settings[row.setting] if row.setting is not None else ()
        group = f"logger.group={folder.name}"  # of W&B; overrides may name another one
        last_words = f"name={name}", f"seed={seed}", f"runs_dir={home}"
        words = (*setting, *row.overrides, group, *overrides, *last_words)
        config = load_config(scale.config, words)
        title = f"run {number} of {seeds * len(table.rows)} ({row.name}, seed {seed})"
        job = StudyJob(
            name,
            title,
            folder,
            home / name,
            [str(scale.config), *words],
            again=registry.words(config.extensions, config.callbacks),
            is_own=partial(same_config, config=config),
        )
        runs.append(Run(row, seed, config, job))
    first = flatten(runs[0].config)
    for run in runs[: len(table.rows)]:
        for key, value in flatten(run.config).items():
            if value != first[key] and not key.startswith(KEYS_OF_A_ROW):
                raise ConfigError(
                    f"row {run.row.name!r} sets {key}, so it would not see the same training. Rows"
                    f" may differ in {', '.join(KEYS_OF_A_ROW[:-1])}"
                )
    return runs


def read_states(runs: Sequence[Run]) -> None:
    """Set the runs' states from their files; a state that belongs to a run of another config counts
    as none."""
    for run in runs:
        state = run.job.read()
        if state.status == "finished" and state.results.get("digest") == run.digest:
            continue
        if state.run_dir and Path(state.run_dir) not in run.job.run_dirs():
            run.job.state = State()
        elif state.status == "finished":
            # the configuration has a key that it had not: its result is read again
            run.job.state = State("cut", state.run_dir, state.seconds) if state.run_dir else State()


def same_config(run_dir: Path, config: Config) -> bool:
    """Return whether a run is of this config, wherever it is kept and shown. A field that is newer
    than the run counts unless it is at its default."""
    was = SeenRun(run_dir).config
    return all(
        was[key] == value
        for key, value in flat(to_yaml(config)).items()
        if not key.startswith(NOT_IN_DIGEST)
    )


def kept_results(run: SeenRun, digest: str) -> dict[str, Any]:
    """Return the results that a state keeps of a finished run. curve: points (steps done,
    validation loss)."""
    environment = json.loads((run.path / "env.json").read_text(encoding="utf-8"))
    last = run.max_steps  # after which the last validation is logged
    curve = {
        min(int(row["step"]) + 1, last): row["val/loss"] for row in run.metrics if "val/loss" in row
    }
    return {
        "digest": digest,
        "data": data_of(run.path),
        "summary": {key: value for key, value in run.summary.items() if key != "run_dir"},
        "curve": sorted(curve.items()),
        "environment": {
            "machine": (
                f"{environment['cpus']} CPU cores, {environment['platform'].partition('-')[0]}"
            ),
            "torch": environment["packages"]["torch"],
            "git_commit": environment["git_commit"],
            "date": run.path.name[:8],
        },
    }


def data_of(run_dir: Path) -> str | None:
    """Return the digest of the data that a run has read, as its checkpoints have it; None: it has
    none."""
    metas = (
        read_meta(path)
        for path in sorted(run_dir.glob("checkpoints/*.ckpt"))
        if (path / META).exists()
    )
    parts = (part for meta in metas for part in meta.values() if isinstance(part, dict))
    return next((str(part["data"]) for part in parts if "consumed_samples" in part), None)


def look_up(tree: Any, dotted: str) -> float | None:
    """Return the finite number under a dotted key of nested mappings; None: none. A name may have
    dots in it."""
    if not isinstance(tree, dict):
        return None
    if dotted in tree:
        return float(tree[dotted]) if is_number(tree[dotted]) else None
    numbers = (
        look_up(tree[key], dotted[len(key) + 1 :]) for key in tree if dotted.startswith(f"{key}.")
    )
    return next((number for number in numbers if number is not None), None)


def refuse_to_overwrite(runs: Sequence[Run], to: Path) -> None:
    """Raise ConfigError if `save` would drop or replace results of other runs than these."""
    study = runs[0].job.study
    folder = to / study.name
    by_file = {run.job.state_file.name: run for run in runs}
    for path in sorted(folder.glob("states/*.json")):
        kept = read_json(path).get("results", {})
        run = by_file.get(path.name)
        if run is None:
            raise ConfigError(
                f"--to is {to}, and {folder} has the run {path.stem}, which would be missing in its"
                " new results. Give more --seeds or another folder"
            )
        if not kept:
            raise ConfigError(f"--to is {to}, but {path} is not whole. Remove it: it is made again")
        if kept.get("digest") != run.digest:
            raise ConfigError(
                f"--to is {to}, and {folder} has results of another configuration, such as those of"
                f" {path.stem}. Remove {folder} or give another folder"
            )
        if read_json(run.job.state_file).get("results", {}).get("summary") != kept.get("summary"):
            raise ConfigError(
                f"--to is {to}, and {folder} has a run {path.stem} that {study} does not have. Copy"
                " the states/ of the first into the second to add to its runs, or give another"
                " folder"
            )


def save(runs: Sequence[Run], to: Path) -> Path:
    """Copy the results, as JSON and as a page, and the states of finished runs into
    <to>/<table>-<scale>/."""
    study = runs[0].job.study
    folder = to / study.name
    results = json.loads((study / "results.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        row["run_dirs"] = []  # they stay on this machine
    for run in finished(runs):
        state = json.loads(run.job.state_file.read_text(encoding="utf-8")) | {"run_dir": None}
        write_whole(folder / "states" / run.job.state_file.name, state, indent=None)
    write_text_whole(folder / "table.md", (study / "table.md").read_text(encoding="utf-8"))
    write_whole(folder / "results.json", results)
    return folder
