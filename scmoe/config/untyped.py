"""Values that no field gives a type, as those of `options`, `callbacks` and `trainer.extra`: how
they are read from YAML and written again."""

import json
import math
import re
from contextlib import suppress
from typing import Any

NULL = ("", "~", "null", "None")
NOT_FINITE = {".inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}  # as YAML writes them
PLAIN_WORD = re.compile(r"[\w./+-]+")
# JSON leaves them as they are; YAML refuses them or takes them for the end of a line.
ESCAPED_IN_YAML = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")


class Quoted(str):
    """A text that stands in quotes in YAML, so it is no number and no null there."""


def guessed(value: Any) -> Any:
    """Return what texts of YAML mean, and lists and mappings of them: null, true or false, a
    number, else a text. A `Quoted` is a text."""
    if isinstance(value, list):
        return [guessed(each) for each in value]
    if isinstance(value, dict):
        return {str(key): guessed(each) for key, each in value.items()}
    if isinstance(value, Quoted):
        return str(value)
    if value in NULL:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for number in (int, float):
        with suppress(ValueError):
            return number(value)
    return NOT_FINITE.get(value, value)


def as_word(value: Any) -> str:
    """Return a value as YAML of one line, of which `guessed` makes it again.

    A text has no quotes where it needs none.
    """
    if isinstance(value, str) and PLAIN_WORD.fullmatch(value) and guessed(value) == value:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return ESCAPED_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
