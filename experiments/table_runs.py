"""The runs of a table and what is known of each: rows x seeds, a state file for each that is whole or not there.

    <runs_dir>/tables/<table>-<scale>/   runs/<row>-seed<s>/<stamp>-.../  ordinary run directories
                                         states/<row>-seed<s>.json        status, run directory, seconds, summary
                                         logs/<row>-seed<s>.log           what the run printed

Rows see the same tokens in the same order: they share everything but `model`, `moe` and `schedule`. A seed draws a
weight by its name, so that what two rows have in common begins alike. A run counts as this table's only if its config
is the same as it would be now.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.table_config import Row, Scale, Table
from scmoe.config.fields import Config, ConfigError, flatten
from scmoe.config.load import load, parse_yaml, to_yaml
from scmoe.parallel.checkpoint.durable import write_durably

STOPPED = (143, -signal.SIGTERM, -signal.SIGINT)  # what a run ends with that was asked to stop
OWN = ("model.", "moe.", "schedule.", "name")  # what a row may have for itself
LOG_TAIL = 4096


@dataclass(frozen=True, eq=False)  # a run is itself
class Run:
    """One row with one seed."""

    row: Row
    seed: int
    folder: Path  # of the table
    config_file: Path
    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def title(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    def run_dirs(self) -> list[Path]:
        """Directories of this run's trainings with this config, the newest first."""
        found = sorted((self.folder / "runs" / self.name).glob("*/config.yaml"), reverse=True)
        return [path.parent for path in found if same_config(path, self.config)]

    def arguments(self) -> list[str]:
        """For experiments.train: go on with what is there, else begin."""
        for run_dir in self.run_dirs():
            if any(run_dir.glob("checkpoints/*.ckpt")):
                return ["--resume", str(run_dir)]
        return [str(self.config_file), *self.overrides]


@dataclass(frozen=True)
class State:
    """What is known of a run, kept in a file."""

    status: str  # waiting, running, finished, failed or cut
    run_dir: str | None = None
    seconds: float = 0.0  # of all its sessions
    summary: dict[str, Any] | None = None
    error: str | None = None


def plan(table: Table, scale: Scale, folder: Path, seeds: int, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs of a table, seed by seed. ConfigError for a row that would not see the same training."""
    runs = []
    for seed in range(1, seeds + 1):
        for row in table.rows:
            own = (f"name={row.slug}-seed{seed}", f"seed={seed}", f"runs_dir={folder / 'runs'}")
            words = (*row.overrides, *overrides, *own)
            runs.append(Run(row, seed, folder, scale.config, words, load(scale.config, words)))
    first = flatten(runs[0].config)
    for run in runs[: len(table.rows)]:
        for key, value in flatten(run.config).items():
            if value != first[key] and not key.startswith(OWN):
                raise ConfigError(f"row {run.row.name!r} sets {key}, allowed: {', '.join(OWN[:-1])} keys of the model")
    return runs


def same_config(stored: Path, config: Config) -> bool:
    """Is this a run of this config? A field that is newer than the run counts if it is not at its default."""
    was, now, default = (_flat(text) for text in (stored.read_text(), to_yaml(config), to_yaml(Config())))
    return all(was.get(key, default[key]) == value for key, value in now.items())


# ---------------------------------------------------------------------- state


def state_of(run: Run) -> State:
    """As kept; `waiting` where there is nothing, or where it was another config's."""
    path = _state_path(run)
    if not path.exists():
        return State("waiting")
    state = State(**json.loads(path.read_text()))
    if state.run_dir is not None and Path(state.run_dir) not in run.run_dirs():
        return State("waiting")
    return replace(state, status="cut") if state.status == "running" else state  # the lock is ours: nobody runs it


def keep(run: Run, state: State) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    path = _state_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    write_durably(fresh, json.dumps(asdict(state), indent=2) + "\n")
    os.replace(fresh, path)


def outcome(run: Run, code: int, metric: str) -> State:
    """What has become of a run that ended with this exit code."""
    run_dirs = run.run_dirs()
    where = str(run_dirs[0]) if run_dirs else None
    if code in STOPPED:
        return State("cut", where)
    if code != 0:
        return State("failed", where, error=f"exit code {code}: {_last_line(run.log)}")
    done = [run_dir / "summary.json" for run_dir in run_dirs if (run_dir / "summary.json").exists()]
    summary = json.loads(done[0].read_text()) if done else {}
    if not isinstance(summary.get(metric), (int, float)):
        return State("failed", where, error=f"it ended without {metric} in its summary")
    return State("finished", str(done[0].parent), summary=summary)


# ---------------------------------------------------------------------- logs


def fraction(run: Run) -> float:
    """How far a run has come, by the last step in its log."""
    steps = re.findall(r"^step (\d+)/(\d+) ", _tail(run.log), re.MULTILINE)
    return min(1.0, int(steps[-1][0]) / int(steps[-1][1])) if steps else 0.0


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    return lines[-1].removeprefix("[rank0]: ")[:200] if lines else "it said nothing"


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        return file.read().decode(errors="replace")


def _state_path(run: Run) -> Path:
    return run.folder / "states" / f"{run.name}.json"


def _flat(text: str) -> dict[str, Any]:
    """Dotted keys and texts of a whole config's YAML."""
    flat: dict[str, Any] = {}
    for key, value in parse_yaml(text, "a run's config.yaml").items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
