"""Reads runs from their directories: state, best loss, speed, curves, and how their configs
differ."""

import csv
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from scmoe.config.as_yaml import to_yaml
from scmoe.config.derived import steps_for
from scmoe.config.fields import Config
from scmoe.config.installation import scmoe
from scmoe.config.leaves import ConfigError, show
from scmoe.config.load import mapping_of, parse_yaml, read_text
from scmoe.config.registry import IMAGES
from scmoe.datamodules.folders import walk_once
from scmoe.files import read_json, warn_once
from scmoe.training.run.directory import read_metrics, read_state

ONE_LINE = 1000  # columns without a terminal, so that a run is a line that can be searched
STATE_COLORS = {"finished": "green", "running": "cyan", "failed": "red", "cut": "yellow"}
BATCH_KEYS = ("data.global_batch_size", "data.seq_len")
STEP_NAME = re.compile(r"step=(\d+)(-v\d+)?\.ckpt")  # -v1: of earlier versions
# keys that say where a run is kept, not what it computes
NOT_COMPARED = ("name", "runs_dir", "logger.")


@dataclass(frozen=True, repr=False)
class SeenRun:
    """A run directory, read without building its model."""

    path: Path

    def __repr__(self) -> str:
        facts = (f"{name} {value}" for name, value in self.facts().items())
        return f"<SeenRun {self.path}: {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        """Return the run as a notebook shows it."""
        facts = {"run": str(self.path), **self.facts()}
        rows = [f"<tr><th>{name}</th><td>{escape(fact)}</td></tr>" for name, fact in facts.items()]
        return f"<table>{''.join(rows)}</table>"

    def facts(self) -> dict[str, str]:
        """Return what a line about the run says: its state, its steps, its best loss, its speed."""
        if not self.config_path.exists():  # it was moved or removed since
            return {"state": "no longer there"}
        facts = {"state": self.state, "steps": f"{self.steps}/{self.max_steps}"}
        if self.best_loss is not None:
            facts["best validation loss"] = f"{self.best_loss:.4f}"
        if self.per_s:
            facts[f"{self.counts}/s"] = f"{self.per_s:,.0f}"
        return facts

    @cached_property
    def config_path(self) -> Path:
        """The file of the configuration as last resumed."""
        steps = [path.stem.rpartition("-")[2] for path in self.path.glob("config-from-*.yaml")]
        numbers = sorted(int(step) for step in steps if step.isdecimal())
        return self.path / (f"config-from-{numbers[-1]}.yaml" if numbers else "config.yaml")

    @cached_property
    def config(self) -> dict[str, str]:
        """The configuration as last resumed: dotted keys and texts.

        A key that the run's version did not have is at its default. ConfigError: it is damaged.
        """
        path = str(self.config_path)
        config = {**CONFIG_DEFAULTS, **flat(read_text(self.config_path), path)}
        counts_tokens = config["trainer.max_steps"] == "null"
        length = "trainer.max_tokens" if counts_tokens else "trainer.max_steps"
        for key in (length, *BATCH_KEYS):
            if not config[key].isdecimal():
                raise ConfigError(f"{path}: {key} is {show(config[key])}. It must be a number.")
        return config

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv without empty cells.

        An incomplete row, which a crash may leave, is left out. ConfigError: the file is damaged.
        """
        try:
            rows_of_texts = read_metrics(self.path)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path / 'metrics.csv'}: cannot be read: {error}") from error
        rows = list[dict[str, float]]()
        for row in rows_of_texts:
            with suppress(TypeError, ValueError):  # cells beyond the columns are a list
                numbers = {key: float(value) for key, value in row.items() if value != ""}
                if math.isfinite(numbers.get("step", math.nan)):
                    rows.append(numbers)
        return rows

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The numbers of the summary; {} where there is none, or the run has gone on since."""
        kept = read_json(self.path / "summary.json")
        steps = kept.get("steps")
        if isinstance(steps, int) and steps < self.steps:
            return {}
        return kept

    @property
    def state(self) -> str:
        return read_state(self.path)

    @property
    def steps(self) -> int:
        """The number of steps, as far as logged or saved.

        A validation after the last step has one row more.
        """
        rows = [row for row in self.metrics if "train/loss" in row] or self.metrics
        logged = [int(row["step"]) + 1 for row in rows]
        names = [path.name for path in self.path.glob("checkpoints/step=*.ckpt")]
        saved = [int(step[1]) for name in names if (step := STEP_NAME.fullmatch(name))]
        return max([*logged, *saved], default=0)

    @property
    def max_steps(self) -> int:
        """The number of steps of the whole training, as its configuration says."""
        if (steps := self.config["trainer.max_steps"]) != "null":
            return int(steps)
        tokens = int(self.config["trainer.max_tokens"])
        batch = int(self.config["data.global_batch_size"])
        return steps_for(tokens, batch, int(self.config["data.seq_len"]))

    @property
    def best_loss(self) -> float | None:
        losses = [loss for _, loss in self.curve("val/loss")]
        # nothing is below a NaN that comes first
        return min((loss for loss in losses if not math.isnan(loss)), default=None)

    @property
    def counts(self) -> str:
        """The unit of the run's data: tokens or images. What extensions register is not known
        here, so the rows tell it of their data."""
        logs_images = any("train/images" in row for row in self.metrics)
        return "images" if logs_images or self.config["data.name"] in IMAGES else "tokens"

    @property
    def per_s(self) -> float | None:
        """The tokens (images) per second: the summary's value, else the last logged one."""
        name = f"{self.counts}_per_s"
        logged = self.curve(f"time/{name}")
        speed = self.summary.get(name)
        if isinstance(speed, int | float):
            return speed
        return logged[-1][1] if logged else None

    @property
    def begun(self) -> float:
        """The time of its start: the stamp in the directory's name, else the time of its config."""
        try:
            return datetime.strptime(self.path.name[:15], "%Y%m%d-%H%M%S").timestamp()
        except ValueError:
            return (self.path / "config.yaml").stat().st_mtime

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Return points (tokens or images, value) of a metric. A row's step is the last one before
        it, from 0."""
        per_step = int(self.config["data.global_batch_size"])
        per_step *= int(self.config["data.seq_len"]) if self.counts == "tokens" else 1
        return [
            ((row["step"] + 1) * per_step, row[metric]) for row in self.metrics if metric in row
        ]


NO_FIELDS = ("callbacks", "options", "trainer.extra")  # their keys are chosen by users


def flat(text: str, source: str = "config.yaml") -> dict[str, str]:
    """Return dotted keys and texts of a config.yaml of any version of this project.

    source: its name in messages. ConfigError: the text is no such file.
    """
    tree = mapping_of(parse_yaml(text, source), source)
    return {key: str(value) for key, value in _leaves(tree)}


def _leaves(tree: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and section + key not in NO_FIELDS:
            yield from _leaves(value, f"{section}{key}.")
        else:
            yield section + key, value


CONFIG_DEFAULTS = flat(to_yaml(Config()))


def train(config: Config) -> SeenRun | None:
    """Train a configuration and return its run: `metrics`, `summary`, `curve("val/loss")`, `path`
    for `scmoe.load`.

    Return None on a rank other than 0 that torchrun or SLURM has started. Errors are those of
    `train_from_python`.
    """
    # imported here: it needs Lightning, and listing runs does not
    from scmoe.training.run.from_python import train_from_python

    run_dir = train_from_python(config)
    return None if run_dir is None else SeenRun(run_dir)


def find_runs(folder: Path) -> list[SeenRun]:
    """Return all run directories below a folder, the newest first, each once.

    The folder of an experiment may be a link to another disk. A link named `latest` is left out.
    """
    runs = list[SeenRun]()
    for here, folders, names in walk_once(folder):
        if "latest" in folders and Path(here, "latest").is_symlink():
            folders.remove("latest")
        if {"overrides.txt", "config.yaml"} <= {*names}:
            runs.append(SeenRun(Path(here)))
    return sorted(runs, key=lambda run: run.begun, reverse=True)


def readable(runs: Iterable[SeenRun]) -> list[SeenRun]:
    """Return the runs without those whose configuration or metrics are damaged. A line on standard
    error names each of these."""
    kept = []
    for run in runs:
        try:
            run.config, run.metrics  # noqa: B018  they are read here, and kept
        except ConfigError as error:
            warn_once(f"a run is left out: {error}")
        else:
            kept.append(run)
    return kept


def open_run(name: str, folder: Path = Path("runs")) -> SeenRun:
    """Return a run by its directory, or by its path below the folder of runs.

    Raises ConfigError if there is none.
    """
    for path in (Path(name), folder / name):
        if (path / "config.yaml").exists():
            return SeenRun(path.resolve() if path.is_symlink() else path)
    raise ConfigError(
        f"There is no run {name!r}. Give the directory of a run; {scmoe('runs')} lists them."
    )


def differences(runs: Sequence[SeenRun]) -> dict[str, list[str]]:
    """Return the keys that are not equal in all runs, and their values by run."""
    keys = [key for key in CONFIG_DEFAULTS if not key.startswith(NOT_COMPARED)]
    columns = {key: [run.config[key] for run in runs] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def differing_fields(runs: Sequence[SeenRun]) -> dict[SeenRun, str]:
    """Return for each run the fields that differ from more than half of its experiment:
    `optim.lr=0.01`.

    An experiment is the runs in the folder of one sweep or one table, or else of one name.
    """
    by_home: dict[Path, list[SeenRun]] = {}
    for run in runs:
        folders = run.path.absolute().parents[:3]
        home = next(
            (folder for folder in folders if folder.parent.name in ("sweeps", "tables")), folders[0]
        )
        by_home.setdefault(home, []).append(run)

    words: dict[SeenRun, list[str]] = {run: [] for run in runs}
    for together in by_home.values():
        for key, values in differences(together).items():
            usual, times = Counter(values).most_common(1)[0]
            for run, value in zip(together, values, strict=True):
                if value != usual or times <= len(values) / 2:
                    words[run].append(f"{key}={value}")
    return {run: " ".join(fields) for run, fields in words.items()}


def runs_table(runs: Sequence[SeenRun], folder: Path) -> Table:
    table = Table(
        Column("run", overflow="fold"),
        Column("state", no_wrap=True),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("steps", "best val loss", "tokens/s", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("differs in", overflow="fold")

    words = differing_fields(runs)
    for run in runs:
        best = "" if run.best_loss is None else f"{run.best_loss:.4f}"
        speed = "" if run.per_s is None else f"{run.per_s:,.0f}"
        if speed and run.counts == "images":
            speed += " images/s"
        table.add_row(
            Text(str(run.path.relative_to(folder))),
            Text(run.state, style=STATE_COLORS.get(run.state, "")),
            f"{run.steps}/{run.max_steps}",
            best,
            speed,
            age(time.time() - run.begun),
            Text(words[run]),
        )
    return table


def age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
