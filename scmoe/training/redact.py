"""Removes keys from what a run keeps of itself (fault 33): its config, its command line, changes to the code."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

STARS = "*****"
NAMES = re.compile(  # of environment variables that hold keys; PWD and OLDPWD are folders
    r"(KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|_PWD|CREDENTIALS?)$", re.IGNORECASE
)
SHORTEST = 8  # characters of a key; a shorter value would also match harmless text
SHAPES = re.compile(
    r"(?<![\w/])[0-9a-f]{40}(?![\w/])"  # W&B's; within a path it is the name of a snapshot
    r"|wandb_v\d+_\w{20,}|hf_[A-Za-z0-9]{20,}"
)


def redacted(value: Any, variables: Mapping[str, str] = os.environ) -> Any:
    """Return `value` with stars for keys, in texts, lists, mappings and dataclasses.

    Keys are what looks like one of W&B or Hugging Face, and the lines of variables whose name ends like one in NAMES.
    """
    lines = {line.strip() for name, text in variables.items() if NAMES.search(name) for line in text.splitlines()}
    keys = sorted((line for line in lines if len(line) >= SHORTEST), key=len, reverse=True)
    return _starred(value, re.compile("|".join([*map(re.escape, keys), SHAPES.pattern])))


def _starred(value: Any, keys: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return keys.sub(STARS, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_starred(v, keys) for v in value)
    if isinstance(value, dict):
        return {k: _starred(v, keys) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _starred(getattr(value, f.name), keys) for f in fields(value)})
    return value
