"""One parameter of a sweep, as W&B writes it: values to choose from, or a distribution.

Left out of W&B's distributions: beta and q_beta.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.experiments.studies.checks import LIST, NUMBER, Rule, check, is_int, is_number, refusal

BOUNDED = ("int_uniform", "uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values")
DISTRIBUTIONS = {  # and their keys, which are required unless they have a default
    **{"constant": "value", "categorical": "values", "categorical_w_probabilities": "values probabilities"},
    **dict.fromkeys(BOUNDED, "min max"),
    **dict.fromkeys(("q_uniform", "q_log_uniform", "q_log_uniform_values"), "min max q"),
    **{"normal": "mu sigma", "log_normal": "mu sigma", "q_normal": "mu sigma q", "q_log_normal": "mu sigma q"},
}
DEFAULTS = {"mu": 0, "sigma": 1, "q": 1}
ANY: Rule = (lambda value: True, "a value")
POSITIVE: Rule = (lambda value: is_number(value) and value > 0, "a number above 0")
RULES = {
    **{"distribution": ANY, "value": ANY, "values": LIST, "probabilities": LIST, "sigma": POSITIVE, "q": POSITIVE},
    **dict.fromkeys(("min", "max", "mu"), NUMBER),
}
GRID = ("constant", "categorical", "categorical_w_probabilities", "int_uniform", "q_uniform")


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
            x = math.exp(x)
        return round(x / q) * q if self.distribution.startswith("q_") else x


def read_axis(name: str, spec: Any, method: str) -> Axis:
    """Return a parameter's axis. A missing name of the distribution is filled in as W&B does. Raises ConfigError."""
    key = f"parameters.{name}"
    if not isinstance(spec, dict):
        raise refusal(key, spec, "a mapping with value, values, or a distribution")
    if "parameters" in spec:
        raise ConfigError(f"{key} is nested, allowed: its fields by dotted names, such as {name}.x")
    kind = spec.get("distribution")
    if kind is None:
        guesses = {"value": "constant", "probabilities": "categorical_w_probabilities", "values": "categorical"}
        integers = is_int(spec.get("min")) and is_int(spec.get("max"))
        guess = "int_uniform" if integers else "uniform"
        kind = next((guess for given, guess in guesses.items() if given in spec), guess)
    if kind not in DISTRIBUTIONS:
        raise refusal(f"{key}.distribution", kind, " | ".join(DISTRIBUTIONS))
    fields = DISTRIBUTIONS[kind].split()
    rules = {field: RULES[field] for field in ("distribution", *fields)}
    check(key, spec, rules, [field for field in fields if field not in DEFAULTS])
    if method == "grid" and kind not in GRID:
        raise refusal(f"{key}.distribution", kind, f"{' | '.join(GRID)} for method grid")
    shares, values = spec.get("probabilities"), spec.get("values", [])
    if shares and not (len(shares) == len(values) and all(is_number(share) and share >= 0 for share in shares)):
        raise refusal(f"{key}.probabilities", shares, "a number for each value, 0 or more")
    if kind == "int_uniform" and not (is_int(spec["min"]) and is_int(spec["max"])):
        raise refusal(f"{key}.min", spec["min"], "whole numbers for min and max of int_uniform")
    if "min" in spec and spec["min"] >= spec["max"]:
        raise refusal(f"{key}.min", spec["min"], f"less than max, {spec['max']}")
    if kind.endswith("_values") and spec["min"] <= 0:
        raise refusal(f"{key}.min", spec["min"], f"above 0 for {kind}")
    return Axis(kind, {**DEFAULTS, **spec})
