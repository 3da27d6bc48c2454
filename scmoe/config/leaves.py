"""Walks a tree of dataclasses whose fields are options, and describes their values for help and error messages."""

import re
from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


def option(
    default: Any, help: str, range: str | None = None, names: Callable[[], tuple[str, ...]] | None = None
) -> Any:
    """Return a field with its default, the line that `--help` shows, and its range (`in_range`).

    names: gives the texts that are allowed, of a Registry.
    """
    return field(default=default, metadata={"help": help, "range": range, "names": names})


def flatten(tree: Any) -> dict[str, Any]:
    """Return every value under its dotted key, as loggers take it."""
    return {leaf.key: leaf.value for leaf in leaves(tree)}


# Whether a value is refused, its key, and what is allowed instead.
Rule = tuple[object, str, str]


class ConfigError(ValueError):
    """An error in one line: where, which key, what was given, what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Leaf(NamedTuple):
    """One field of the tree with its value."""

    key: str
    type: Any
    value: Any
    help: str
    range: str | None
    names: Callable[[], tuple[str, ...]] | None = None

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of the type, such as (int, NoneType) for `int | null`."""
        return get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal without null, or the registered names; () for any other field."""
        if self.names is not None:
            return self.names()
        return tuple(choice for kind in self.types if get_origin(kind) is Literal for choice in get_args(kind))

    @property
    def allowed(self) -> str:
        """Type and range in words, such as `int | null, above 0`."""
        names = {bool: "true | false", type(None): "null", list[str]: "list[str]", dict[str, Any]: "mapping"}
        others = [kind for kind in self.types if get_origin(kind) is not Literal and self.names is None]
        words = [*map(str, self.choices), *(names.get(kind, kind.__name__) for kind in others)]
        return " | ".join(words) + (f", {self.range}" if self.range else "")


def leaves(tree: Any, prefix: str = "") -> Iterator[Leaf]:
    """Yield all fields of a tree of dataclasses under their dotted keys, in order of definition."""
    types = get_type_hints(type(tree))
    for entry in fields(tree):
        key, value = prefix + entry.name, getattr(tree, entry.name)
        if is_dataclass(value):
            yield from leaves(value, key + ".")
        else:
            more = entry.metadata.get("range"), entry.metadata.get("names")
            yield Leaf(key, types[entry.name], value, entry.metadata["help"], *more)


def show(value: Any) -> str:
    """Return a value as a user would type it, cut if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def in_range(text: str, value: float) -> bool:
    """Return whether a value is in a range, which is written as messages and `--help` show it.

    text: `A to B`, `above A, at most B`, or `A or more, below B`; numbers such as 64, 1e6, 2^17 or 2^31 - 1.
    """
    low, high = re.split(r" to |, at most | or more, below ", text.removeprefix("above "))
    least, most = _number(low), _number(high)
    if text.startswith("above "):
        return least < value <= most
    if " below " in text:
        return least <= value < most
    return least <= value <= most


def _number(text: str) -> float:
    base, _, power = text.removesuffix(" - 1").partition("^")
    number = int(base) ** int(power) if power else float(base)
    return number - 1 if text.endswith(" - 1") else number
