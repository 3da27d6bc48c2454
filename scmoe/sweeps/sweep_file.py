"""A W&B sweep file, read as W&B reads it.

The rules are those of W&B's sweep configuration; the names and values of parameters are those of
scmoe.config. A wrong file is refused before the first trial. What only W&B's own agent can run
(early_terminate, metric.impute, other distributions than DISTRIBUTIONS) goes to W&B as it is, and
is refused for a run on this machine. Not supported: Launch jobs, several metrics, own schedulers,
nested parameters.
"""

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, key_of, show
from scmoe.config.load import find, load, mapping_of, read_unchecked, what_is_bad
from scmoe.config.rules import NAME
from scmoe.sweeps import checks
from scmoe.sweeps.checks import Rule, check, refusal

ANY: Rule = (lambda value: True, "a value")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("name", "description", "program", "project", "entity"), checks.TEXT),
    "method": checks.one_of("grid", "random", "bayes"),
    "run_cap": checks.COUNT,
    "parameters": checks.MAPPING,
    "metric": ANY,  # checked by itself
    "early_terminate": ANY,  # W&B checks it
    "command": (
        lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
        "[..., scmoe, train, CONFIG, key=value ..., ${args_no_hyphens}]",
    ),
}
METRIC: dict[str, Rule] = {
    "name": (checks.TEXT[0], "the name of a metric, such as val/loss"),
    "goal": checks.one_of("minimize", "maximize"),
    "target": checks.NUMBER,
    **dict.fromkeys(("impute", "impute_while_running"), ANY),  # W&B checks them
}
DISTRIBUTIONS = {  # those that run here, and their keys, which are required
    "constant": ("value",),
    "categorical": ("values",),
    **dict.fromkeys(("int_uniform", "uniform", "log_uniform_values"), ("min", "max")),
}
AXIS = {
    **dict.fromkeys(("distribution", "value"), ANY),
    "values": checks.LIST,
    **dict.fromkeys(("min", "max"), checks.NUMBER),
}
GRID = ("constant", "categorical", "int_uniform")
PROGRAM = "scmoe/__main__.py"
OLD_PROGRAM = (  # sweep files of earlier versions name this file, or one of these modules
    "experiments/train.py"
)
OLD_MODULES = ("experiments.train", "scmoe.experiments.train")
PROBES = 20  # number of combinations in which a value is tried before it is refused


@dataclass(frozen=True)
class Axis:
    """The values of one parameter. spec: its keys in the file."""

    distribution: str
    spec: dict[str, Any]

    @property
    def choices(self) -> Sequence[Any] | None:
        """Return the values to choose from; None for a distribution over numbers."""
        if self.distribution == "constant":
            return [self.spec["value"]]
        return self.spec["values"] if self.distribution == "categorical" else None

    @property
    def grid(self) -> Sequence[Any]:
        """Return all values, of a distribution in GRID."""
        if self.choices is not None:
            return self.choices
        return range(self.spec["min"], self.spec["max"] + 1)

    def at(self, point: int | float) -> Any:
        """Return the choice of an index, or the quantile of a distribution over numbers."""
        return self.quantile(point) if self.choices is None else self.choices[int(point)]

    def quantile(self, u: float) -> Any:
        """Return the value below which a share u of the distribution lies; of choices the u-th."""
        if (choices := self.choices) is not None:
            return choices[min(int(u * len(choices)), len(choices) - 1)]
        low, high = self.spec["min"], self.spec["max"]
        if self.distribution == "int_uniform":
            return min(high, low + math.floor(u * (high - low + 1)))
        if self.distribution == "uniform":
            return low + u * (high - low)
        return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))


@dataclass(frozen=True)
class Sweep:
    """A sweep file that can be run. raw: what W&B gets. launcher: the trial's command up to the
    config file. only_at_wandb: the settings with which it cannot run on this machine."""

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
    only_at_wandb: list[str]

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

    Raises ConfigError, in one line, for what W&B would refuse, for an unknown parameter, and for
    what cannot run here.
    """
    try:
        raw = yaml.safe_load(
            find(path).read_text(encoding="utf-8")
        )  # as W&B does: 1e-3 is a text, 1.0e-3 a number
        raw = mapping_of(raw, "sweep file")
        _check(raw)
        raw = renamed(raw)
        launcher, config, overrides = _command(raw)
        raw = {**raw, "command": [*raw["command"][:-1], *extra, raw["command"][-1]]}
        axes = {
            name: axis
            for name, spec in raw["parameters"].items()
            if (axis := read_axis(name, spec, raw["method"]))
        }
        metric = raw.get("metric", {"name": "val/loss"})
        name = raw.get("name", Path(path).stem)
        if not NAME.fullmatch(name):  # it becomes a folder
            raise ConfigError(
                f"name is {show(name)}. A name has letters, digits, '.', '_' and '-', a letter or"
                " digit first"
            )
        minimize = metric.get("goal", "minimize") == "minimize"
        overrides = [*overrides, *extra]
        base = load(config, overrides)
        sweep = Sweep(
            name,
            raw,
            raw["method"],
            metric["name"],
            minimize,
            axes,
            launcher,
            config,
            overrides,
            base,
            _only_at_wandb(raw, axes),
        )
        _probe(sweep)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {what_is_bad(error)}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ConfigError(f"{path}: not a sweep file that can be read: {error}") from error
    return sweep


def _check(raw: Any) -> None:
    """Check all of a sweep file but its command and its parameters."""
    check("", raw, RULES, ("program", "command", "method", "parameters"))
    if "metric" in raw:
        check("metric", raw["metric"], METRIC, ("name",))
    elif raw["method"] == "bayes" or "early_terminate" in raw:
        raise ConfigError(
            "metric is missing. Name a metric, which method bayes and early_terminate require"
        )


def _only_at_wandb(raw: dict[str, Any], axes: Mapping[str, Axis]) -> list[str]:
    """Return the settings of a file that only W&B's agent can run."""
    settings = ["early_terminate"] if "early_terminate" in raw else []
    settings += [f"metric.{key}" for key in raw.get("metric", {}) if key.startswith("impute")]
    return settings + [
        f"the distribution of {name}" for name in raw["parameters"] if name not in axes
    ]


def renamed(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a sweep file with today's name of the program that trains. Files of earlier versions
    have other names."""
    words = {"${program}": ["${program}", "train"]} if raw["program"] == OLD_PROGRAM else {}
    command: list[str] = []
    for word in raw["command"]:
        after_m = command[-1:] == ["-m"]
        names = ["scmoe", "train"] if after_m else ["train"]
        command += names if word in OLD_MODULES else words.get(word, [word])
    program = PROGRAM if raw["program"] == OLD_PROGRAM else raw["program"]
    return {**raw, "program": program, "command": command}


def _command(raw: dict[str, Any]) -> tuple[list[str], str, list[str]]:
    """Return the three parts of `launcher config overrides... ${args_no_hyphens}`."""
    command = raw["command"]
    start = command.index("train") + 1 if "train" in command else len(command)
    launcher = command[:start]
    arguments = command[start:-1]
    ends_well = command[-1:] in (["${args}"], ["${args_no_hyphens}"])
    if not ends_well or not arguments or "=" in arguments[0]:
        raise refusal("command", command, RULES["command"][1])
    if not all("=" in word for word in arguments[1:]):
        raise refusal("command", command, RULES["command"][1])
    meaning = {
        "${env}": "/usr/bin/env",
        "${interpreter}": sys.executable,
        "${program}": raw["program"],
    }
    launcher = [meaning.get(word, word) for word in launcher]
    # `scmoe` need not be on PATH, and must be the one that runs the sweep.
    if launcher[-2:-1] == ["scmoe"] and launcher[-3:-2] != ["-m"]:
        launcher[-2:-1] = [sys.executable, "-m", "scmoe"]
    for word in [*launcher, *arguments]:
        if "${" in word:
            raise ConfigError(
                f"command has {word!r}, allowed: {' | '.join((*meaning, '${args_no_hyphens}'))}"
            )
    return launcher, arguments[0], arguments[1:]


def _probe(sweep: Sweep) -> None:
    """Refuse a parameter that no configuration has, and a value that no combination can have."""
    fixed = {key_of(word) for word in sweep.overrides}
    for name in sweep.raw["parameters"]:
        if name in fixed:
            raise ConfigError(f"parameters.{name} is in the command too. Set it in one of the two")
        if name not in flatten(sweep.base):
            # Raises with a hint, unless it is an option of an extension or of a callback.
            read_unchecked(sweep.config, [*sweep.overrides, f"{name}=0"])
    if len(sweep.axes) < len(sweep.raw["parameters"]):
        return  # a combination has values that only W&B can draw
    for name, axis in sweep.axes.items():
        is_grid = sweep.method == "grid"
        values = (
            axis.grid if is_grid else axis.choices or [axis.quantile(u) for u in (0.0, 0.5, 1.0)]
        )
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


def read_axis(name: str, spec: Any, method: str) -> Axis | None:
    """Return a parameter's axis; None: it has another distribution of W&B's, which W&B checks.

    A missing name of the distribution is filled in as W&B does. Raises ConfigError.
    """
    key = f"parameters.{name}"
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{key} is {show(spec)}. Give a mapping with `value`, `values`, or `min` and `max`"
        )
    if "parameters" in spec:
        raise ConfigError(f"{key} is nested. Use dotted names instead, such as {name}.x")
    are_ints = checks.is_int(spec.get("min")) and checks.is_int(spec.get("max"))
    kind = spec.get("distribution") or _usual_distribution(spec, are_ints)
    if kind not in [*DISTRIBUTIONS]:
        return None
    fields = DISTRIBUTIONS[kind]
    check(key, spec, {field: AXIS[field] for field in ("distribution", *fields)}, fields)
    if method == "grid" and kind not in GRID:
        raise refusal(f"{key}.distribution", kind, f"{' | '.join(GRID)} for method grid")
    if kind == "int_uniform" and not are_ints:
        raise ConfigError(f"{key}: min and max of int_uniform must be whole numbers")
    if "min" in spec and spec["min"] >= spec["max"]:
        raise ConfigError(
            f"{key}.min is {spec['min']}, but it must be less than max, {spec['max']}"
        )
    if kind == "log_uniform_values" and spec["min"] <= 0:
        raise ConfigError(f"{key}.min is {spec['min']}, but {kind} requires one above 0")
    return Axis(kind, spec)


def _usual_distribution(spec: Mapping[str, Any], are_ints: bool) -> str:
    """Return the distribution that W&B chooses where the file names none."""
    if "value" in spec:
        return "constant"
    if "probabilities" in spec:
        return "categorical_w_probabilities"
    if "values" in spec:
        return "categorical"
    return "int_uniform" if are_ints else "uniform"
