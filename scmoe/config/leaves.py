"""Walks a tree of dataclasses whose fields are options, and describes their values for help and
error messages."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """An error in one line: what is wrong with which key, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Range(NamedTuple):
    """The numbers from `least` to `most`. without: the end that is excluded."""

    least: float
    most: float
    without: Literal["least", "most"] | None = None

    def has(self, value: float) -> bool:
        """Return whether a value is one of the numbers."""
        if self.without == "least":
            return self.least < value <= self.most
        if self.without == "most":
            return self.least <= value < self.most
        return self.least <= value <= self.most

    def __str__(self) -> str:
        least = number(self.least)
        most = number(self.most)
        if self.without == "least":
            return f"above {least}, at most {most}"
        if self.without == "most":
            return f"{least} or more, below {most}"
        return f"{least} to {most}"


COUNT = Range(1, 2**31 - 1)
COUNT_OR_0 = Range(0, 2**31 - 1)
DIM_RANGE = Range(1, 2**17)
IDS = Range(1, 2**24)
PIXELS = Range(1, 2**14)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, "most")
WEIGHT = Range(0, 1000)
ABOVE_0 = Range(0, 1e6, "least")


def number(value: float) -> str:
    """Return a number as `--help` shows it; large ones as 2^17, 2^31 - 1 or 1e6."""
    for power in range(14, 33):
        if value in (2**power, 2**power - 1):
            return f"2^{power}" if value == 2**power else f"2^{power} - 1"
    return f"{value:g}".replace("e+0", "e")


def four_digits(value: float) -> str:
    """Return a number with four digits; a large one with all digits before the point, as 86,000 and
    not 8.6e+04."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:,.4g}"


def option(
    default: Any,
    help: str,
    range: Range | None = None,
    names: Callable[[], tuple[str, ...]] | None = None,
) -> Any:
    """Return a field with its default, the line that `--help` shows, and its range.

    names: gives the texts that are allowed, of a Registry.
    """
    metadata = {"help": help, "range": range, "names": names}
    if isinstance(default, list | dict):  # each Config has its own
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flatten(tree: Any) -> dict[str, Any]:
    """Return every value under its dotted key, as loggers take it."""
    return {leaf.key: leaf.value for leaf in leaves(tree)}


class Leaf(NamedTuple):
    """One field of the tree with its value."""

    key: str
    type: Any
    value: Any
    help: str
    range: Range | None
    names: Callable[[], tuple[str, ...]] | None

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of the type, such as (int, NoneType) for `int | null`."""
        return get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal without null, or the registered names; () for any other field."""
        if self.names is not None:
            return self.names()
        return tuple(
            choice
            for kind in self.types
            if get_origin(kind) is Literal
            for choice in get_args(kind)
        )

    @property
    def allowed(self) -> str:
        """Type and range in words, such as `int | null, above 0`."""
        names = {
            bool: "true | false",
            type(None): "null",
            list[str]: "list[str]",
            list[int]: "list[int]",
            dict[str, Any]: "mapping",
        }
        others = [
            kind for kind in self.types if get_origin(kind) is not Literal and self.names is None
        ]
        words = [*map(str, self.choices), *(names.get(kind, kind.__name__) for kind in others)]
        return " | ".join(words) + (f", {self.range}" if self.range else "")


def leaves(tree: Any, prefix: str = "") -> Iterator[Leaf]:
    """Yield all fields of a tree of dataclasses under their dotted keys, in order of definition."""
    types = _types(type(tree))  # type: ignore[arg-type]  # a class can be hashed, mypy denies it
    for entry in fields(tree):
        key, value = prefix + entry.name, getattr(tree, entry.name)
        if is_dataclass(value):
            yield from leaves(value, key + ".")
        else:
            yield Leaf(key, types[entry.name], value, **entry.metadata)


@cache
def _types(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def show(value: Any) -> str:
    """Return a value as a user would type it, cut if it is long."""
    text = "null" if value is None else repr(value)
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= 80 else text[:77] + "..."


def show_typed(value: Any) -> str:
    """Return what `show` returns of a value that is read as text: a number, a truth and null have
    no quotes."""
    if not isinstance(value, str) or len(value) > 80:
        return show(value)
    with suppress(ValueError):
        float(value)
        return value
    return value if value.lower() in ("true", "false", "null") else show(value)


def plain(value: Any) -> str:
    """Return a default as YAML writes it, without quotes."""
    return value if isinstance(value, str) else show(value)
