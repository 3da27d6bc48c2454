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

from scmoe.config.fields import ConfigError
from scmoe.studies.checks import LIST, NUMBER, Rule, check, is_int, is_number, refusal

# Keys of each distribution: those that are required, and those that have a default.
BOUNDS, NORMAL = ("min max", ""), ("", "mu sigma")
DISTRIBUTIONS = {
    "constant": ("value", ""),
    "categorical": ("values", ""),
    "categorical_w_probabilities": ("values probabilities", ""),
    **dict.fromkeys(("int_uniform", "uniform", "log_uniform", "log_uniform_values"), BOUNDS),
    **dict.fromkeys(("inv_log_uniform", "inv_log_uniform_values"), BOUNDS),
    **dict.fromkeys(("q_uniform", "q_log_uniform", "q_log_uniform_values"), ("min max", "q")),
    **dict.fromkeys(("normal", "log_normal"), NORMAL),
    **dict.fromkeys(("q_normal", "q_log_normal"), ("", "mu sigma q")),
}
ANY: Rule = (lambda value: True, "a value")
RULES = {
    **{"value": ANY, "values": LIST, "probabilities": LIST},
    **dict.fromkeys(("min", "max", "mu", "sigma", "q"), NUMBER),
}
GRID = ("constant", "categorical", "categorical_w_probabilities", "int_uniform", "q_uniform")


@dataclass(frozen=True)
class Axis:
    """One parameter: the values to choose from, or a distribution."""

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
        low, high, step = self.spec["min"], self.spec["max"], self.spec.get("q", 1)
        return [low + i * step for i in range(int((high - low) / step + 1e-9) + 1)]

    def quantile(self, u: float) -> Any:
        """Return the value below which a share u of the distribution lies; of choices the one at u."""
        if (choices := self.choices) is not None:
            ends = list(accumulate(self.spec.get("probabilities", [1] * len(choices))))
            return choices[min(bisect_right(ends, u * ends[-1]), len(choices) - 1)]
        kind, q = self.distribution.removeprefix("q_"), self.spec.get("q", 1)
        if kind.endswith("normal"):
            x = NormalDist(self.spec.get("mu", 0), self.spec.get("sigma", 1)).inv_cdf(min(max(u, 1e-9), 1 - 1e-9))
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
    required, optional = (keys.split() for keys in DISTRIBUTIONS[kind])
    check(key, spec, {"distribution": ANY, **{field: RULES[field] for field in [*required, *optional]}}, required)
    if method == "grid" and kind not in GRID:
        raise refusal(f"{key}.distribution", kind, f"{' | '.join(GRID)} for method grid")
    _check_numbers(key, kind, spec)
    return Axis(kind, spec)


def _check_numbers(key: str, kind: str, spec: dict[str, Any]) -> None:
    """Refuse numbers that do not fit together."""
    shares = spec.get("probabilities", [1] * len(spec.get("values", [])))
    if len(shares) != len(spec.get("values", [])) or not all(is_number(share) and share >= 0 for share in shares):
        raise refusal(f"{key}.probabilities", shares, "a number for each value, 0 or more")
    if kind == "int_uniform" and not (is_int(spec["min"]) and is_int(spec["max"])):
        raise refusal(f"{key}.min", spec["min"], "whole numbers for min and max of int_uniform")
    if "min" in spec and spec["min"] >= spec["max"]:
        raise refusal(f"{key}.min", spec["min"], f"less than max, {spec['max']}")
    if kind.endswith("_values") and spec["min"] <= 0:
        raise refusal(f"{key}.min", spec["min"], f"above 0 for {kind}")
    for field in ("q", "sigma"):
        if spec.get(field, 1) <= 0:
            raise refusal(f"{key}.{field}", spec[field], "above 0")
