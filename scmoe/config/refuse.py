"""How a check refuses a value: it yields the key, and allowed values or a remedy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, show


@dataclass(frozen=True)
class Remedy:
    """Why a value is wrong and what to do, in sentences, where no list of values says it."""

    text: str


# A key, and the values that are allowed for it, or a remedy.
Refusals = Iterator[tuple[str, str | Remedy]]


def refuse(config: Config, *checks: Callable[[Config], Refusals], prefix: str = "") -> None:
    """Raise ConfigError for the first value that a check refuses. prefix: of the message."""
    for check in checks:
        for key, instead in check(config):
            rest = f". {instead.text}" if isinstance(instead, Remedy) else f", allowed: {instead}"
            raise ConfigError(f"{prefix}{key} is {show(flatten(config)[key])}{rest}")
