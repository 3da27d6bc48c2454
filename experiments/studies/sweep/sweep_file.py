"""A W&B sweep file, read as W&B reads it.

The rules are those of W&B's sweep configuration; the names and values of parameters are those of scmoe.config. A wrong
file is refused before the first trial. Left out, since nothing here could run it: Launch jobs, several metrics, own
schedulers, nested parameters, and the beta distributions.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, show
from scmoe.config.load import load
from scmoe.config.rules import NAME
from scmoe.config.shipped import find
from scmoe.experiments.studies.checks import COUNT, MAPPING, NUMBER, TEXT, Rule, check, is_number, one_of, refusal
from scmoe.experiments.studies.sweep.axis import Axis, read_axis

RULES: dict[str, Rule] = {
    **dict.fromkeys(("name", "description", "program", "project", "entity"), TEXT),
    **{"method": one_of("grid", "random", "bayes"), "run_cap": COUNT, "parameters": MAPPING},
    **dict.fromkeys(("metric", "early_terminate"), (lambda value: True, "")),  # checked by themselves
    "command": (
        lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
        "[..., experiments.train, CONFIG, key=value ..., ${args_no_hyphens}], program experiments/train.py",
    ),
}
METRIC: dict[str, Rule] = {
    "name": (TEXT[0], "the name of a metric, such as val/loss"),
    "goal": one_of("minimize", "maximize"),
    "target": NUMBER,
    "impute": one_of("latest", "best", "worst"),
    "impute_while_running": one_of("latest", "best", "worst", "false"),
}
HYPERBAND: dict[str, Rule] = {
    "type": one_of("hyperband"),
    **dict.fromkeys(("min_iter", "max_iter", "s"), COUNT),
    "eta": (lambda value: is_number(value) and value > 1, "a number above 1"),
    "strict": (lambda value: isinstance(value, bool), "true | false"),
}
TRAIN = ("experiments.train", "scmoe.experiments.train")  # the first exists in a checkout only
PROBES = 20  # number of combinations in which a value is tried before it is refused


@dataclass(frozen=True)
class Sweep:
    """A sweep file that can be run. raw: what W&B gets. launcher: the trial's command up to the config file."""

    name: str
    raw: dict[str, Any]
    method: str
    metric: str
    minimize: bool
    axes: dict[str, Axis]
    launcher: list[str]
    config: str
    overrides: list[str]
    base: Config

    @property
    def run_cap(self) -> int | None:
        return self.raw.get("run_cap")

    @property
    def folder(self) -> Path:
        return Path(self.base.runs_dir) / "sweeps" / self.name


def words(parameters: dict[str, Any]) -> list[str]:
    """Return parameters as overrides, written as W&B's agent writes them."""
    return [f"{name}={value}" for name, value in parameters.items()]


def read(path: str, extra: Sequence[str] = ()) -> Sweep:
    """Read a sweep; the overrides `extra` are added to the command of all its trials.

    Raises ConfigError, in one line, for what W&B would refuse, for an unknown parameter, and for what cannot run here.
    """
    try:
        raw = yaml.safe_load(find(path).read_text(encoding="utf-8"))  # as W&B does: 1e-3 is a text, 1.0e-3 a number
        _check(raw)
        launcher, config, overrides = _command(raw)
        raw = {**raw, "command": [*raw["command"][:-1], *extra, raw["command"][-1]]}
        axes = {name: read_axis(name, spec, raw["method"]) for name, spec in raw["parameters"].items()}
        metric = raw.get("metric", {"name": "val/loss"})
        name = raw.get("name", Path(path).stem)
        if not NAME.fullmatch(name):  # it becomes a folder
            raise refusal("name", name, "letters, digits, '.', '_' and '-', a letter or digit first")
        minimize = metric.get("goal", "minimize") == "minimize"
        overrides = [*overrides, *extra]
        base = load(config, overrides)
        sweep = Sweep(name, raw, raw["method"], metric["name"], minimize, axes, launcher, config, overrides, base)
        _probe(sweep)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a sweep file that can be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return sweep


def _check(raw: Any) -> None:
    """Check all of a sweep file but its command and its parameters."""
    check("", raw, RULES, ("program", "command", "method", "parameters"))
    if "metric" in raw:
        check("metric", raw["metric"], METRIC, ("name",))
    elif raw["method"] == "bayes" or "early_terminate" in raw:
        raise ConfigError("metric is missing, allowed: a metric, which method bayes and early_terminate require")
    if "early_terminate" in raw:
        check("early_terminate", raw["early_terminate"], HYPERBAND, ("type",))
        needed = {"max_iter", "s"} if "max_iter" in raw["early_terminate"] else {"min_iter"}
        if not needed <= raw["early_terminate"].keys():
            raise ConfigError("early_terminate is incomplete, allowed: min_iter, or max_iter and s")


def _command(raw: dict[str, Any]) -> tuple[list[str], str, list[str]]:
    """Return the three parts of `launcher config overrides... ${args_no_hyphens}`."""
    command = raw["command"]
    trains = {*TRAIN, "${program}"} if raw["program"] == "experiments/train.py" else {*TRAIN}
    start = next((i for i, word in enumerate(command, 1) if word in trains), len(command))
    launcher, given, last = command[:start], command[start:-1], command[-1:]
    ends_well = last in (["${args}"], ["${args_no_hyphens}"])
    if not ends_well or not given or "=" in given[0] or not all("=" in word for word in given[1:]):
        raise refusal("command", command, RULES["command"][1])
    meaning = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable, "${program}": raw["program"]}
    launcher = [meaning.get(word, word) for word in launcher]
    for word in [*launcher, *given]:
        if "${" in word:
            raise ConfigError(f"command has {word!r}, allowed: {' | '.join((*meaning, '${args_no_hyphens}'))}")
    return launcher, given[0], given[1:]


def _probe(sweep: Sweep) -> None:
    """Refuse a parameter that no configuration has, and a value with which no combination can run."""
    fixed = {word.removeprefix("--").partition("=")[0] for word in sweep.overrides}
    for name in sweep.axes:
        if name in fixed:
            raise ConfigError(f"parameters.{name} is in the command too, allowed: one of them")
        if name not in flatten(sweep.base):
            load(sweep.config, [f"{name}=0"])  # raises, with a hint
    for name, axis in sweep.axes.items():
        is_grid = sweep.method == "grid"
        values = axis.grid if is_grid else axis.choices or [axis.quantile(u) for u in (0.0, 0.5, 1.0)]
        for value in values:
            refused = None
            for others in islice(grid(sweep) if is_grid else _points(sweep), PROBES):
                try:
                    load(sweep.config, [*sweep.overrides, *words({**others, name: value})])
                    break
                except ConfigError as error:
                    refused = refused or error
            else:
                raise ConfigError(f"parameters.{name} cannot be {show(value)}: {refused}")


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield all combinations of a grid, in the order of the file."""
    for values in product(*(axis.grid for axis in sweep.axes.values())):
        yield dict(zip(sweep.axes, values, strict=True))


def _points(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield points of the space that are no grid: the medians, and then random points."""
    yield {name: axis.quantile(0.5) for name, axis in sweep.axes.items()}
    draw = random.Random(0)
    while True:
        yield {name: axis.quantile(draw.random()) for name, axis in sweep.axes.items()}
