"""Checks of the YAML files of studies. A refusal names the key, its value, and what is allowed."""

import math
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any

from scmoe.config.leaves import ConfigError, show

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*choices: str) -> Rule:
    return lambda value: value in choices, " | ".join(choices)


TEXT: Rule = (lambda value: isinstance(value, str), "a text")
NUMBER: Rule = (is_number, "a number")
WHOLE_NUMBER: Rule = (lambda value: is_int(value) and value > 0, "a whole number above 0")
MAPPING: Rule = (
    lambda value: isinstance(value, dict) and bool(value),
    "a mapping that is not empty",
)
LIST: Rule = (lambda value: isinstance(value, list) and bool(value), "a list that is not empty")


def check(
    prefix: str, mapping: Any, rules: Mapping[str, Rule], required: Collection[str] = ()
) -> None:
    """Raise ConfigError for a missing or unknown key, and for a value against its rule. prefix: ""
    for a whole file."""
    if not isinstance(mapping, dict):
        raise refusal(prefix, mapping, "a mapping of keys to values")
    dotted = f"{prefix}." if prefix else ""
    for key in mapping:
        if key not in rules:
            near = get_close_matches(str(key), rules, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            where = f" in {prefix}" if prefix else ""
            raise ConfigError(f"unknown key {show(key)}{where}, {hint}allowed: {' | '.join(rules)}")
    for key in required:
        if key not in mapping:
            raise ConfigError(f"{dotted}{key} is missing. Give {rules[key][1]}")
    for key, (is_allowed, allowed) in rules.items():
        if key in mapping and not is_allowed(mapping[key]):
            is_text = allowed.startswith(NUMBER[1]) and isinstance(mapping[key], str)
            hint = "; YAML reads 1e-3 as a text, 1.0e-3 as a number" if is_text else ""
            raise refusal(f"{dotted}{key}", mapping[key], allowed + hint)


def refusal(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{key} is {show(value)}, allowed: {allowed}")
