"""A W&B sweep file, read as W&B reads it.

The rules are those of W&B's sweep configuration; the names and values of parameters are those of
scmoe.config. A wrong file is refused before the first trial. Left out, since nothing here could run
it: Launch jobs, several metrics, own schedulers, nested parameters, and the distributions beta and
q_beta.
"""

import math
import random
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, show
from scmoe.config.load import find, load
from scmoe.config.rules import NAME
from scmoe.sweeps import checks
from scmoe.sweeps.checks import Rule, check, refusal

ANY: Rule = (lambda value: True, "a value")
POSITIVE: Rule = (lambda value: checks.is_number(value) and value > 0, "a number above 0")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("name", "description", "program", "project", "entity"), checks.TEXT),
    "method": checks.one_of("grid", "random", "bayes"),
    "run_cap": checks.COUNT,
    "parameters": checks.MAPPING,
    **dict.fromkeys(("metric", "early_terminate"), ANY),  # checked by themselves
    "command": (
        lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
        "[..., scmoe, train, CONFIG, key=value ..., ${args_no_hyphens}]",
    ),
}
METRIC: dict[str, Rule] = {
    "name": (checks.TEXT[0], "the name of a metric, such as val/loss"),
    "goal": checks.one_of("minimize", "maximize"),
    "target": checks.NUMBER,
    "impute": checks.one_of("latest", "best", "worst"),
    "impute_while_running": checks.one_of("latest", "best", "worst", "false"),
}
HYPERBAND: dict[str, Rule] = {
    "type": checks.one_of("hyperband"),
    **dict.fromkeys(("min_iter", "max_iter", "s"), checks.COUNT),
    "eta": (lambda value: checks.is_number(value) and value > 1, "a number above 1"),
    "strict": (lambda value: isinstance(value, bool), "true | false"),
}
BOUNDED = (
    "int_uniform",
    "uniform",
    "log_uniform",
    "log_uniform_values",
    "inv_log_uniform",
    "inv_log_uniform_values",
)
DISTRIBUTIONS = {  # and their keys, which are required unless they have a default
    "constant": "value",
    "categorical": "values",
    "categorical_w_probabilities": "values probabilities",
    **dict.fromkeys(BOUNDED, "min max"),
    **dict.fromkeys(("q_uniform", "q_log_uniform", "q_log_uniform_values"), "min max q"),
    **dict.fromkeys(("normal", "log_normal"), "mu sigma"),
    **dict.fromkeys(("q_normal", "q_log_normal"), "mu sigma q"),
}
DEFAULTS = {"mu": 0, "sigma": 1, "q": 1}
AXIS = {
    **dict.fromkeys(("distribution", "value"), ANY),
    **dict.fromkeys(("values", "probabilities"), checks.LIST),
    **dict.fromkeys(("sigma", "q"), POSITIVE),
    **dict.fromkeys(("min", "max", "mu"), checks.NUMBER),
}
GRID = ("constant", "categorical", "categorical_w_probabilities", "int_uniform", "q_uniform")
PROGRAM = "scmoe/__main__.py"
OLD_PROGRAM = (  # sweep files of earlier versions name this file, or one of these modules
    "experiments/train.py"
)
OLD_MODULES = ("experiments.train", "scmoe.experiments.train")
MOST_EXPONENT = 700.0  # e to this is still a float; no parameter can be so large
PROBES = 20  # number of combinations in which a value is tried before it is refused


@dataclass(frozen=True)
class Axis:
    """spec: the parameter's keys in the file, and DEFAULTS."""

    distribution: str
    spec: dict[str, Any]

    @property
    def choices(self) -> Sequence[Any] | None:
        """The values to choose from; None for a distribution over numbers."""
        if self.distribution == "constant":
            return [self.spec["value"]]
        return self.spec["values"] if self.distribution.startswith("categorical") else None

    @property
    def grid(self) -> Sequence[Any]:
        if self.choices is not None:
            return self.choices
        low, high, step = self.spec["min"], self.spec["max"], self.spec["q"]
        return [low + i * step for i in range(int((high - low) / step + 1e-9) + 1)]

    def at(self, place: int | float) -> Any:
        """Return the choice of an index, or the quantile of a distribution over numbers."""
        return self.quantile(place) if self.choices is None else self.choices[int(place)]

    def quantile(self, u: float) -> Any:
        """Return the value below which a share u of the distribution lies; of choices the one at u."""
        if (choices := self.choices) is not None:
            ends = list(accumulate(self.spec.get("probabilities", [1] * len(choices))))
            return choices[min(bisect_right(ends, u * ends[-1]), len(choices) - 1)]
        kind, q = self.distribution.removeprefix("q_"), self.spec["q"]
        if kind.endswith("normal"):
            x = NormalDist(self.spec["mu"], self.spec["sigma"]).inv_cdf(min(max(u, 1e-9), 1 - 1e-9))
        else:
            low, high = self.spec["min"], self.spec["max"]
            if kind == "int_uniform":
                return min(high, low + math.floor(u * (high - low + 1)))
            if kind.endswith("log_uniform_values"):
                low, high = math.log(low), math.log(high)
            x = low + u * (high - low)
            if kind == "inv_log_uniform":  # log 1/x is uniform
                x = -x
        if "log" in kind:
            x = math.exp(min(x, MOST_EXPONENT))
        return round(x / q) * q if self.distribution.startswith("q_") else x


@dataclass(frozen=True)
class Sweep:
    """A sweep file that can be run. raw: what W&B gets. launcher: the trial's command up to the
    config file."""

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

    Raises ConfigError, in one line, for what W&B would refuse, for an unknown parameter, and for
    what cannot run here.
    """
    try:
        raw = yaml.safe_load(
            find(path).read_text(encoding="utf-8")
        )  # as W&B does: 1e-3 is a text, 1.0e-3 a number
        _check(raw)
        raw = renamed(raw)
        launcher, config, overrides = _command(raw)
        raw = {**raw, "command": [*raw["command"][:-1], *extra, raw["command"][-1]]}
        axes = {
            name: read_axis(name, spec, raw["method"]) for name, spec in raw["parameters"].items()
        }
        metric = raw.get("metric", {"name": "val/loss"})
        name = raw.get("name", Path(path).stem)
        if not NAME.fullmatch(name):  # it becomes a folder
            raise refusal(
                "name", name, "letters, digits, '.', '_' and '-', a letter or digit first"
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
        )
        _probe(sweep)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
    ) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ConfigError(f"{path}: not a sweep file that can be read: {error}") from error
    return sweep


def _check(raw: Any) -> None:
    """Check all of a sweep file but its command and its parameters."""
    check("", raw, RULES, ("program", "command", "method", "parameters"))
    if "metric" in raw:
        check("metric", raw["metric"], METRIC, ("name",))
    elif raw["method"] == "bayes" or "early_terminate" in raw:
        raise ConfigError(
            "metric is missing, allowed: a metric, which method bayes and early_terminate require"
        )
    if "early_terminate" in raw:
        check("early_terminate", raw["early_terminate"], HYPERBAND, ("type",))
        needed = {"max_iter", "s"} if "max_iter" in raw["early_terminate"] else {"min_iter"}
        if not needed <= raw["early_terminate"].keys():
            raise ConfigError("early_terminate is incomplete, allowed: min_iter, or max_iter and s")


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
    launcher, given, last = command[:start], command[start:-1], command[-1:]
    ends_well = last in (["${args}"], ["${args_no_hyphens}"])
    if not ends_well or not given or "=" in given[0] or not all("=" in word for word in given[1:]):
        raise refusal("command", command, RULES["command"][1])
    meaning = {
        "${env}": "/usr/bin/env",
        "${interpreter}": sys.executable,
        "${program}": raw["program"],
    }
    launcher = [meaning.get(word, word) for word in launcher]
    for word in [*launcher, *given]:
        if "${" in word:
            raise ConfigError(
                f"command has {word!r}, allowed: {' | '.join((*meaning, '${args_no_hyphens}'))}"
            )
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


def read_axis(name: str, spec: Any, method: str) -> Axis:
    """Return a parameter's axis. A missing name of the distribution is filled in as W&B does.
    Raises ConfigError."""
    key = f"parameters.{name}"
    if not isinstance(spec, dict):
        raise refusal(key, spec, "a mapping with value, values, or a distribution")
    if "parameters" in spec:
        raise ConfigError(f"{key} is nested, allowed: its fields by dotted names, such as {name}.x")
    are_ints = checks.is_int(spec.get("min")) and checks.is_int(spec.get("max"))
    kind = spec.get("distribution")
    if kind is None:
        guesses = {
            "value": "constant",
            "probabilities": "categorical_w_probabilities",
            "values": "categorical",
        }
        guess = "int_uniform" if are_ints else "uniform"
        kind = next((guess for given, guess in guesses.items() if given in spec), guess)
    if not isinstance(kind, str) or kind not in DISTRIBUTIONS:
        raise refusal(f"{key}.distribution", kind, " | ".join(DISTRIBUTIONS))
    fields = DISTRIBUTIONS[kind].split()
    rules = {field: AXIS[field] for field in ("distribution", *fields)}
    check(key, spec, rules, [field for field in fields if field not in DEFAULTS])
    if method == "grid" and kind not in GRID:
        raise refusal(f"{key}.distribution", kind, f"{' | '.join(GRID)} for method grid")
    shares, values = spec.get("probabilities"), spec.get("values", [])
    if shares and not (
        len(shares) == len(values)
        and all(checks.is_number(share) and share >= 0 for share in shares)
    ):
        raise refusal(f"{key}.probabilities", shares, "a number for each value, 0 or more")
    if kind == "int_uniform" and not are_ints:
        raise refusal(f"{key}.min", spec["min"], "whole numbers for min and max of int_uniform")
    if "min" in spec and spec["min"] >= spec["max"]:
        raise refusal(f"{key}.min", spec["min"], f"less than max, {spec['max']}")
    if kind.endswith("_values") and spec["min"] <= 0:
        raise refusal(f"{key}.min", spec["min"], f"above 0 for {kind}")
    return Axis(kind, {**DEFAULTS, **spec})
