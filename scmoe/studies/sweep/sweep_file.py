"""A W&B sweep file, read as W&B reads it: what it may say, and what of it can be run here.

The rules are those of W&B's sweep configuration; the names and values of parameters are those of scmoe.config.
Whatever is wrong is refused before the first trial. Left out of what W&B takes, since nothing here could run it: Launch
jobs, several metrics, own schedulers, nested parameters, and the beta distributions.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml

from scmoe.config.fields import Config, ConfigError, flatten, show
from scmoe.config.load import load
from scmoe.config.rules import NAME
from scmoe.studies.sweep.axis import Axis, is_int, is_number, only, read_axis, refusal

KEYS = [
    *("name", "description", "program", "command", "project", "entity", "method", "metric", "parameters"),
    *("early_terminate", "run_cap"),
]
METHODS = ("grid", "random", "bayes")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
PROBES = 20  # combinations in which a value is tried before it is refused


@dataclass(frozen=True)
class Sweep:
    """A sweep file that can be run. raw: what W&B is given. launcher: the trial's command up to the config file."""

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
    """Parameters as overrides, written as W&B's agent writes them."""
    return [f"{name}={value}" for name, value in parameters.items()]


def read(path: str, extra: Sequence[str] = ()) -> Sweep:
    """The sweep of a file, with overrides added to the command of all its trials.

    Raises ConfigError, in one line, for what W&B would refuse, for an unknown parameter, and for what cannot run here.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # as W&B does: 1e-3 is a text, 1.0e-3 a number
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


# ---------------------------------------------------------------------- W&B's rules


def _check(raw: Any) -> None:
    """All of a sweep file but its command and its parameters."""
    only("a sweep", raw, KEYS)
    for key in ("program", "method", "parameters"):
        if key not in raw:
            raise ConfigError(f"{key} is missing")
    for key in ("name", "description", "program", "project", "entity"):
        if not isinstance(raw.get(key, ""), str):
            raise refusal(key, raw[key], "a text")
    if raw["method"] not in METHODS:
        raise refusal("method", raw["method"], " | ".join(METHODS))
    if "run_cap" in raw and not (is_int(raw["run_cap"]) and raw["run_cap"] > 0):
        raise refusal("run_cap", raw["run_cap"], "a whole number above 0")
    if not isinstance(raw["parameters"], dict) or not raw["parameters"]:
        raise refusal("parameters", raw["parameters"], "a mapping of parameters to their values")
    if "metric" in raw:
        _check_metric(raw["metric"])
    elif raw["method"] == "bayes" or "early_terminate" in raw:
        raise ConfigError("metric is missing, which method bayes and early_terminate look at")
    if "early_terminate" in raw:
        _check_early_terminate(raw["early_terminate"])


def _check_metric(metric: Any) -> None:
    only("metric", metric, ("name", "goal", "target", "impute", "impute_while_running"))
    if not isinstance(metric.get("name"), str):
        raise refusal("metric.name", metric.get("name"), "the name of a metric, such as val/loss")
    for key, allowed in {
        "goal": ("minimize", "maximize"),
        "impute": ("latest", "best", "worst"),
        "impute_while_running": ("latest", "best", "worst", "false"),
    }.items():
        if metric.get(key, allowed[0]) not in allowed:
            raise refusal(f"metric.{key}", metric[key], " | ".join(allowed))
    if not is_number(metric.get("target", 0)):
        raise refusal("metric.target", metric["target"], "a number")


def _check_early_terminate(stop: Any) -> None:
    only("early_terminate", stop, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    if stop.get("type") != "hyperband":
        raise refusal("early_terminate.type", stop.get("type"), "hyperband")
    if "min_iter" not in stop and not {"max_iter", "s"} <= stop.keys():
        raise ConfigError("early_terminate is incomplete, allowed: min_iter, or max_iter and s")
    for key in ("min_iter", "max_iter", "s"):
        if key in stop and not (is_int(stop[key]) and stop[key] > 0):
            raise refusal(f"early_terminate.{key}", stop[key], "a whole number above 0")
    if not (is_number(stop.get("eta", 3)) and stop.get("eta", 3) > 1):
        raise refusal("early_terminate.eta", stop["eta"], "a number above 1")
    if not isinstance(stop.get("strict", True), bool):
        raise refusal("early_terminate.strict", stop["strict"], "true | false")


# ---------------------------------------------------------------------- ours


def _command(raw: dict[str, Any]) -> tuple[list[str], str, list[str]]:
    """The launcher, the config file and the overrides of `launcher config overrides... ${args_no_hyphens}`."""
    command = raw.get("command", list(DEFAULT_COMMAND))
    wanted = "[..., experiments.train, CONFIG, key=value ..., ${args_no_hyphens}], program experiments/train.py"
    if not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
        raise refusal("command", command, wanted)
    program = "${program}" if raw["program"] == "experiments/train.py" else "experiments.train"
    starts = [i for i, word in enumerate(command) if word in ("experiments.train", program)]
    if not starts or command[-1] not in ("${args}", "${args_no_hyphens}"):
        raise refusal("command", command, wanted)
    launcher, (*given, _) = command[: starts[0] + 1], command[starts[0] + 1 :]
    if not given or "=" in given[0] or not all("=" in word for word in given[1:]):
        raise refusal("command", command, wanted)
    meaning = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable, "${program}": raw["program"]}
    launcher = [meaning.get(word, word) for word in launcher]
    for word in [*launcher, *given]:
        if "${" in word:
            raise ConfigError(f"command has {word!r}, allowed: {' | '.join((*meaning, '${args_no_hyphens}'))}")
    return launcher, given[0], given[1:]


def _probe(sweep: Sweep) -> None:
    """Refuses a parameter that no configuration has, and a value that none of the combinations can run with."""
    fixed = {word.removeprefix("--").partition("=")[0] for word in sweep.overrides}
    for name in sweep.axes:
        if name in fixed:
            raise ConfigError(f"parameters.{name} is in the command too, allowed: one of them")
        if name not in flatten(sweep.base):
            load(sweep.config, [f"{name}=0"])  # refuses it, with a hint
    for name, axis in sweep.axes.items():
        discrete = axis.grid if sweep.method == "grid" else axis.choices
        for value in discrete if discrete is not None else map(axis.quantile, (0.0, 0.5, 1.0)):
            refused = None
            for others in islice(_combinations(sweep), PROBES):
                try:
                    load(sweep.config, [*sweep.overrides, *words({**others, name: value})])
                    break
                except ConfigError as error:
                    refused = refused or error
            else:
                raise ConfigError(f"parameters.{name} cannot be {show(value)}: {refused}")


def _combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Points of the space: all of a grid, else its medians and then some by chance."""
    if sweep.method == "grid":
        for values in product(*(axis.grid for axis in sweep.axes.values())):
            yield dict(zip(sweep.axes, values, strict=True))
        return
    yield {name: axis.quantile(0.5) for name, axis in sweep.axes.items()}
    draw = random.Random(0)
    while True:
        yield {name: axis.quantile(draw.random()) for name, axis in sweep.axes.items()}
