"""Imports extensions, a user's own modules, which register names (registry.py). An import runs code.

So only a user says what is imported: `extensions` on the command line, or in a file given to a verb as its CONFIG. The
configuration in a run, a checkpoint or an export may be another person's. It imports nothing: `evaluate`, `generate`,
`export`, `resume` and `scmoe.load` refuse its extensions unless the command line names them again, or the user's own
program has imported them.
"""

import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from scmoe.config.leaves import ConfigError, show

PLAIN = re.compile(r"[\w./+-]+")
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def import_extensions(names: Sequence[str]) -> None:
    """Import the modules that are not imported yet. ConfigError, in one line: a name or a module is not good."""
    for name in names:
        if not MODULE.fullmatch(name):
            raise ConfigError(f"extensions has {show(name)}, allowed: names of modules, such as my_package.my_module")
        try:
            import_module(name)
        except Exception as error:  # whatever a user's module raises
            raise ConfigError(f"extensions: {name} cannot be imported: {reason(name, error)}") from error


def reason(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}; install its package, or set PYTHONPATH to its folder"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, ConfigError | SyntaxError) else f" ({place.filename}, line {place.lineno})"
    return f"{'' if isinstance(error, ConfigError) else f'{type(error).__name__}: '}{error}{where}"


def named(overrides: Sequence[str]) -> list[str]:
    """Return those overrides that name extensions."""
    return [override for override in overrides if override.removeprefix("--").partition("=")[0] == "extensions"]


def words(extensions: Sequence[str], callbacks: Mapping[str, Any]) -> list[str]:
    """Return the overrides that name extensions, and callbacks with their options."""
    given = [f"extensions=[{','.join(extensions)}]"] if extensions else []
    for name, options in callbacks.items():
        pairs = options.items() if isinstance(options, Mapping) else ()  # what is kept may have any form
        given += [f"callbacks.{name}.{key}={_yaml(value)}" for key, value in pairs] or [f"callbacks.{name}={{}}"]
    return given


def _yaml(value: Any) -> str:
    """Return a value as YAML of one line, without quotes where it needs none."""
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else json.dumps(value)


def refuse_kept(names: Sequence[str], source: str) -> None:
    """Raise ConfigError for extensions that only a kept configuration names. source: where it is kept."""
    if missing := [name for name in names if name not in sys.modules]:
        raise ConfigError(
            f"{source}: extensions is {show(list(names))}, but the configuration in a run imports nothing, as "
            f"another person may have written it; if you trust {', '.join(missing)}, add {words(names, {})[0]} to the "
            "command, or import it before scmoe.load; extensions=[] goes on without"
        )
