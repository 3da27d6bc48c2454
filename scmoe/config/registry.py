"""The names in a configuration, and the functions that they stand for.

    @scmoe.register_architecture("mine")
    def mine(config, wire, parts): ...

What comes with scmoe is registered in the same way, in training/assembly/. Its names stand here
too, because a configuration is checked before torch is imported. A user's own module registers more
names. docs/extending.md says what each function gets and returns.
"""

import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from scmoe.config.leaves import ConfigError, show
from scmoe.config.untyped import as_word
from scmoe.schedule.schedule import POSITIONS_OF

# A name becomes a key of the configuration, and a part of messages.
EXTENSION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
Make = TypeVar("Make", bound=Callable[..., Any])


class Registry:
    """The functions of one kind by name.

    built_in: the names that come with scmoe. images: those of them for images.
    """

    def __init__(self, kind: str, built_in: Iterable[str] = (), images: Iterable[str] = ()) -> None:
        self.kind = kind
        self.built_in = tuple(built_in)
        self.images = list(images)
        self.makers: dict[str, Callable[..., Any]] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.built_in, *self.makers)))

    def register(self, name: str, *, images: bool = False) -> Callable[[Make], Make]:
        """Return a decorator that registers a function or a class.

        images: it reads or makes images instead of tokens. ConfigError: another function has the
        name, or a configuration cannot contain it.
        """
        if not EXTENSION_NAME.fullmatch(name):
            raise ConfigError(
                f"register_{self.kind}: {show(name)} cannot be a name. Use at most 100 letters,"
                " digits and '_', with a letter first."
            )

        def add(make: Make) -> Make:
            if name in self.makers:
                holder = self.makers[name]
                raise ConfigError(
                    f"register_{self.kind}: {holder.__module__}.{holder.__qualname__} has the name"
                    f" {show(name)} already. Choose another name."
                )
            self.makers[name] = make
            if images and name not in self.images:
                self.images.append(name)
            return make

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.makers[name]


ARCHITECTURES = Registry("architecture", ("dense", *POSITIONS_OF, "dgmoe_share"))
FAMILIES = Registry("family", ("gpt", "llama", "swin"), images=("swin",))
TEXT_DATASETS = ("sotu", "text", "hf")
PICTURES = ("fashion_mnist", "digits", "image_folder")
DATASETS = Registry("dataset", (*TEXT_DATASETS, "synthetic", *PICTURES), images=PICTURES)
IMAGES = DATASETS.images  # grows with what extensions register
OPTIMIZERS = Registry("optimizer", ("adamw", "muon"))
ROUTERS = Registry("router", ("softmax", "deepseek", "longcat"))
CALLBACKS = Registry("callback")


# Extensions are a user's own modules, which register names. An import runs code, so only a user
# says what is imported: `extensions` on the command line, or in a file given to a verb as its
# CONFIG. The configuration in a run, a checkpoint or an export may be another person's. It imports
# nothing: `evaluate`, `generate`, `export`, `resume` and `scmoe.load` refuse its extensions unless
# the command line names them again, or the user's own program has imported them.
MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def import_extensions(names: Sequence[str]) -> None:
    """Import the modules that are not imported yet. ConfigError: a name is not that of a module, or
    the module cannot be imported."""
    for name in names:
        if not MODULE_NAME.fullmatch(name):
            raise ConfigError(
                f"extensions has {show(name)}, which is no name of a module. Write it as in Python:"
                " my_package.my_module."
            )
        try:
            import_module(name)
        except Exception as error:  # whatever a user's module raises
            raise ConfigError(
                f"extensions: {name} cannot be imported: {reason(name, error)}"
            ) from error


def reason(name: str, error: Exception) -> str:
    """Return why a module could not be imported: its error, and the line that has raised it."""
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent and f"{name}.".startswith(f"{absent}."):
        return f"there is no module {absent}; install its package, or set PYTHONPATH to its folder"
    if isinstance(error, ConfigError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # it names the line itself
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({last.filename}, line {last.lineno})"


def named(overrides: Sequence[str], section: str = "extensions") -> list[str]:
    """Return the overrides that set this section of the configuration, or a field in it."""
    return [word for word in overrides if re.split("[.=]", word.removeprefix("--"))[0] == section]


def words(extensions: Sequence[str], callbacks: Mapping[str, Any]) -> list[str]:
    """Return the overrides that name extensions, and callbacks with their options."""
    overrides = []
    if extensions:
        overrides.append(f"extensions=[{','.join(extensions)}]")
    for name, options in callbacks.items():
        if isinstance(options, Mapping) and options:  # what is kept may have any form
            overrides += [f"callbacks.{name}.{key}={as_word(v)}" for key, v in options.items()]
        else:
            overrides.append(f"callbacks.{name}={{}}")
    return overrides


def refuse_kept(names: Sequence[str], source: str) -> None:
    """Raise ConfigError for extensions that only a kept configuration names.

    source: where it is kept.
    """
    if missing := [name for name in names if name not in sys.modules]:
        raise ConfigError(
            f"{source}: extensions is {show(list(names))}, but the configuration in a run imports"
            f" nothing, as another person may have written it; if you trust {', '.join(missing)},"
            f" add {words(names, {})[0]} to the command, or import it before scmoe.load;"
            " extensions=[] goes on without"
        )
