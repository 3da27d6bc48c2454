"""How a check refuses a value: it yields the key, and allowed values or advice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, show


@dataclass(frozen=True)
class Advice:
    """Why a value is wrong and what to do, in sentences, where no list of values says it."""

    text: str


# A key, and the values that are allowed for it, or advice.
Refusals = Iterator[tuple[str, str | Advice]]


def refuse(config: Config, *checks: Callable[[Config], Refusals], prefix: str = "") -> None:
    """Raise ConfigError for the first value that a check refuses. prefix: of the message."""
    for check in checks:
        for key, instead in check(config):
            rest = f". {instead.text}" if isinstance(instead, Advice) else f", allowed: {instead}"
            raise ConfigError(f"{prefix}{key} is {show(flatten(config)[key])}{rest}")
