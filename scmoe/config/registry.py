"""Names that a configuration chooses by, and the functions they stand for.

    @scmoe.register_architecture("mine")
    def mine(config, context, parts): ...

What comes with scmoe is registered in the same way, in training/assembly/. Its names are here as
well, because a configuration is checked before torch is imported. A user's own module registers
more names. What each function gets and returns: docs/extending.md.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from scmoe.config.leaves import ConfigError, show

NAME = re.compile(
    r"[A-Za-z][A-Za-z0-9_]{0,99}"
)  # it becomes a key of the configuration, and a part of messages
Make = TypeVar("Make", bound=Callable[..., Any])


class Registry:
    """The functions of one kind by name. built_in: the names that come with scmoe. images: those
    for images."""

    def __init__(self, kind: str, built_in: Iterable[str] = (), images: Iterable[str] = ()) -> None:
        self.kind, self.built_in, self.images = kind, tuple(built_in), list(images)
        self.makers: dict[str, Callable[..., Any]] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.built_in, *self.makers)))

    def register(self, name: str, *, images: bool = False) -> Callable[[Make], Make]:
        """Return a decorator that registers a function or a class. images: it reads or makes images
        instead of tokens.

        ConfigError: the name is taken, or is none that a configuration can have.
        """
        what = f"register_{self.kind}: the name is {show(name)}"
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{what}, allowed: letters, digits and '_', a letter first, at most 100 in all"
            )

        def add(make: Make) -> Make:
            if name in self.makers:
                there = self.makers[name]
                raise ConfigError(
                    f"{what}, allowed: another one, {there.__module__}.{there.__qualname__} has it"
                )
            self.makers[name] = make
            if images and name not in self.images:
                self.images.append(name)
            return make

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.makers[name]


ARCHITECTURES = Registry(
    "architecture", ("dense", "top_k", "shared_expert", "scmoe", "dgmoe", "dgmoe_share", "farskip")
)
FAMILIES = Registry("family", ("gpt", "llama", "swin"), images=("swin",))
TEXTS, PICTURES = ("sotu", "text", "hf"), ("fashion_mnist", "digits", "image_folder")
DATASETS = Registry("dataset", (*TEXTS, "synthetic", *PICTURES), images=PICTURES)
IMAGES = DATASETS.images  # grows with what extensions register
OPTIMIZERS = Registry("optimizer", ("adamw", "muon"))
ROUTERS = Registry("router", ("softmax", "deepseek", "longcat"))
CALLBACKS = Registry("callback")


# Extensions are a user's own modules, which register names. An import runs code, so only a user
# says what is imported: `extensions` on the command line, or in a file given to a verb as its
# CONFIG. The configuration in a run, a checkpoint or an export may be another person's. It imports
# nothing: `evaluate`, `generate`, `export`, `resume` and `scmoe.load` refuse its extensions unless
# the command line names them again, or the user's own program has imported them.
PLAIN = re.compile(r"[\w./+-]+")
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def import_extensions(names: Sequence[str]) -> None:
    """Import the modules that are not imported yet. ConfigError, in one line: a name or a module is
    not good."""
    for name in names:
        if not MODULE.fullmatch(name):
            raise ConfigError(
                f"extensions has {show(name)}, allowed: names of modules, such as"
                " my_package.my_module"
            )
        try:
            import_module(name)
        except Exception as error:  # whatever a user's module raises
            raise ConfigError(
                f"extensions: {name} cannot be imported: {reason(name, error)}"
            ) from error


def reason(name: str, error: Exception) -> str:
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and f"{name}.".startswith(f"{error.name}.")
    ):
        return (
            f"there is no module {error.name}; install its package, or set PYTHONPATH to its folder"
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = (
        ""
        if isinstance(error, ConfigError | SyntaxError)
        else f" ({place.filename}, line {place.lineno})"
    )
    return f"{'' if isinstance(error, ConfigError) else f'{type(error).__name__}: '}{error}{where}"


def named(overrides: Sequence[str], section: str = "extensions") -> list[str]:
    """Return the overrides that set this section of the configuration, or a field in it."""
    return [word for word in overrides if re.split("[.=]", word.removeprefix("--"))[0] == section]


def words(extensions: Sequence[str], callbacks: Mapping[str, Any]) -> list[str]:
    """Return the overrides that name extensions, and callbacks with their options."""
    given = [f"extensions=[{','.join(extensions)}]"] if extensions else []
    for name, options in callbacks.items():
        pairs = (
            options.items() if isinstance(options, Mapping) else ()
        )  # what is kept may have any form
        given += [f"callbacks.{name}.{key}={_yaml(value)}" for key, value in pairs] or [
            f"callbacks.{name}={{}}"
        ]
    return given


def _yaml(value: Any) -> str:
    """Return a value as YAML of one line, without quotes where it needs none."""
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else json.dumps(value)


def refuse_kept(names: Sequence[str], source: str) -> None:
    """Raise ConfigError for extensions that only a kept configuration names. source: where it is
    kept."""
    if missing := [name for name in names if name not in sys.modules]:
        raise ConfigError(
            f"{source}: extensions is {show(list(names))}, but the configuration in a run imports"
            f" nothing, as another person may have written it; if you trust {', '.join(missing)},"
            f" add {words(names, {})[0]} to the command, or import it before scmoe.load;"
            " extensions=[] goes on without"
        )
