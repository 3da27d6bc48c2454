"""Names that a configuration chooses by, and the functions they stand for.

    @scmoe.register_architecture("mine")
    def mine(config, context, parts): ...

What comes with scmoe is registered in the same way, in training/assembly/. Its names are here as well, because a
configuration is checked before torch is imported. A user's own module registers more names (extensions.py). What each
function gets and returns: docs/extending.md.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from scmoe.config.leaves import ConfigError, show

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")  # it becomes a key of the configuration, and a part of messages
Make = TypeVar("Make", bound=Callable[..., Any])


class Registry:
    """The functions of one kind by name. built_in: the names that come with scmoe. images: those for images."""

    def __init__(self, kind: str, built_in: Iterable[str] = (), images: Iterable[str] = ()) -> None:
        self.kind, self.built_in, self.images = kind, tuple(built_in), list(images)
        self.makers: dict[str, Callable[..., Any]] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.built_in, *self.makers)))

    def register(self, name: str, *, images: bool = False) -> Callable[[Make], Make]:
        """Return a decorator that registers a function or a class. images: it reads or makes images instead of tokens.

        ConfigError: the name is taken, or is none that a configuration can have.
        """
        what = f"register_{self.kind}: the name is {show(name)}"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{what}, allowed: letters, digits and '_', a letter first, at most 100 in all")

        def add(make: Make) -> Make:
            if name in self.makers:
                there = self.makers[name]
                raise ConfigError(f"{what}, allowed: another one, {there.__module__}.{there.__qualname__} has it")
            self.makers[name] = make
            if images and name not in self.images:
                self.images.append(name)
            return make

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.makers[name]


ARCHITECTURES = Registry("architecture", ("dense", "top_k", "shared_expert", "scmoe", "dgmoe", "dgmoe_share"))
FAMILIES = Registry("family", ("gpt", "llama", "swin"), images=("swin",))
TEXTS, PICTURES = ("sotu", "text", "hf"), ("fashion_mnist", "digits", "image_folder")
DATASETS = Registry("dataset", (*TEXTS, "synthetic", *PICTURES), images=PICTURES)
IMAGES = DATASETS.images  # grows with what extensions register
OPTIMIZERS = Registry("optimizer", ("adamw", "muon"))
CALLBACKS = Registry("callback")
