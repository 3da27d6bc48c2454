"""A sweep file: the part of W&B's sweep language that also runs without W&B.

That is method grid, random or bayes over the values of `parameters`, with `run_cap` and `metric`,
of a `command` that is `scmoe train`. The names of parameters are those of scmoe.config. Anything
else is refused before the first trial, in one line that sends the file to W&B.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, show
from scmoe.config.load import find, load_config, mapping_of, read_unchecked, sets, what_is_bad
from scmoe.config.rules import FOLDER_NAME
from scmoe.sweeps import checks
from scmoe.sweeps.checks import Rule, check, refusal

ANY: Rule = (lambda value: True, "a value")
TRAIN_COMMANDS = (["scmoe", "train"], ["${env}", "${interpreter}", "-m", "scmoe", "train"])
ARGUMENTS = "${args_no_hyphens}"  # where W&B writes a trial's parameters
SET_BY_SWEEP = ("name", "logger.group")  # trials.py
COMMAND = (
    f"[scmoe, train, CONFIG, key=value ..., {ARGUMENTS}], where"
    f" `{' '.join(TRAIN_COMMANDS[1][:-1])}` may stand for scmoe"
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("name", "description", "program", "project", "entity"), checks.TEXT),
    "method": checks.one_of("grid", "random", "bayes"),
    "run_cap": checks.WHOLE_NUMBER,
    "parameters": checks.MAPPING,
    "metric": ANY,  # checked by itself
    "command": (
        lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
        COMMAND,
    ),
}
METRIC_RULES: dict[str, Rule] = {
    "name": (checks.TEXT[0], "the name of a metric, such as val/loss"),
    "goal": checks.one_of("minimize", "maximize"),
    "target": checks.NUMBER,
}
DISTRIBUTIONS = {  # and their keys, which are required
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
    """A sweep file that can be run. raw: what W&B gets."""

    name: str
    raw: dict[str, Any]
    method: str
    metric: str
    minimize: bool
    axes: dict[str, Axis]
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

    Raises ConfigError, in one line, for what cannot run here, and for an unknown parameter.
    """
    try:
        # as W&B does: 1e-3 is a text, 1.0e-3 a number
        raw = mapping_of(yaml.safe_load(find(path).read_text(encoding="utf-8")), "sweep file")
        try:
            axes = checked_axes(raw)
            config, overrides = arguments_of(raw["command"])
        except ConfigError as error:
            raise ConfigError(
                f"{error}. If the file needs more of W&B's language, run it at W&B: wandb sweep"
                f" {path}"
            ) from error
        name = raw.get("name", Path(path).stem)
        if not FOLDER_NAME.fullmatch(name):  # it becomes a folder
            raise ConfigError(
                f"name is {show(name)}. A name has letters, digits, '.', '_' and '-', a letter or"
                " digit first"
            )
        overrides = [*overrides, *extra]
        for key in SET_BY_SWEEP:
            if key in axes:
                raise ConfigError(f"parameters.{key} is set by the sweep itself. Leave it out")
            if any(sets(word, key) for word in overrides):
                raise ConfigError(f"{key} is in the command, but the sweep sets it. Leave it out")
        base = load_config(config, overrides)
        _check_names(axes, config, overrides, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {what_is_bad(error)}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ConfigError(f"{path}: not a sweep file that can be read: {error}") from error

    metric = raw.get("metric", {"name": "val/loss"})
    return Sweep(
        name,
        {**raw, "command": [*raw["command"][:-1], *extra, ARGUMENTS]},
        raw["method"],
        metric["name"],
        metric.get("goal", "minimize") == "minimize",
        axes,
        config,
        overrides,
        base,
    )


def checked_axes(raw: dict[str, Any]) -> dict[str, Axis]:
    """Return the axis of each parameter of a sweep file, all of which is checked but its
    command."""
    check("", raw, RULES, ("program", "command", "method", "parameters"))
    if "metric" in raw:
        check("metric", raw["metric"], METRIC_RULES, ("name",))
    elif raw["method"] == "bayes":
        raise ConfigError("metric is missing. Name a metric, which method bayes requires")
    return {name: read_axis(name, spec, raw["method"]) for name, spec in raw["parameters"].items()}


def arguments_of(command: Sequence[str]) -> tuple[str, list[str]]:
    """Return the configuration and the overrides of the command of all trials."""
    arguments = next(
        (command[len(start) : -1] for start in TRAIN_COMMANDS if [*command[: len(start)]] == start),
        [],
    )
    are_overrides = all("=" in word and "${" not in word for word in arguments[1:])
    if command[-1:] != [ARGUMENTS] or not arguments or "=" in arguments[0] or not are_overrides:
        raise refusal("command", command, COMMAND)
    return arguments[0], [*arguments[1:]]


def _check_names(names: Iterable[str], config: str, overrides: Sequence[str], base: Config) -> None:
    """Refuse a parameter that no configuration has, and one that the command sets."""
    for name in names:
        if any(sets(word, name) for word in overrides):
            raise ConfigError(f"parameters.{name} is in the command too. Set it in one of the two")
        if name not in flatten(base):
            # Raises with a hint, unless it is an option of an extension or of a callback.
            read_unchecked(config, [*overrides, f"{name}=0"])


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield all combinations of a grid, in the order of the file."""
    for values in product(*(axis.grid for axis in sweep.axes.values())):
        yield dict(zip(sweep.axes, values, strict=True))


def read_axis(name: str, spec: Any, method: str) -> Axis:
    """Return a parameter's axis. A missing name of the distribution is filled in as W&B does.

    Raises ConfigError.
    """
    key = f"parameters.{name}"
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{key} is {show(spec)}. Give a mapping with `value`, `values`, or `min` and `max`"
        )
    are_ints = checks.is_int(spec.get("min")) and checks.is_int(spec.get("max"))
    kind = spec.get("distribution") or _usual_distribution(spec, are_ints)
    if kind not in [*DISTRIBUTIONS]:
        raise refusal(f"{key}.distribution", kind, " | ".join(DISTRIBUTIONS))
    fields = DISTRIBUTIONS[kind]
    check(key, spec, {field: AXIS[field] for field in ("distribution", *fields)}, fields)
    dates = [v for v in (spec.get("value"), *spec.get("values", ())) if isinstance(v, date)]
    if dates:  # YAML makes one of 2026-01-01; neither JSON nor W&B has dates
        raise ConfigError(f"{key} has the date {dates[0]}. Write it in quotes")
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
    if "values" in spec:
        return "categorical"
    return "int_uniform" if are_ints else "uniform"
