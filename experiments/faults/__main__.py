"""`scmoe faults` breaks checkpoints on purpose."""

import json
import sys
from importlib import import_module
from typing import Literal

from cyclopts import App

from scmoe.experiments.engine.command_line import call

Dense = Literal["replicated", "sharded"]
main = App(
    name="faults",
    help="Break checkpoints on purpose, count what survives (faults 1-10 of docs/faults.md). Standard output is JSON.",
)


@main.command
def kill(*, points: int | Literal["all"] = "all", random: int = 0, dense: Dense = "replicated") -> None:
    """SIGKILL to rank 0, the last rank or all during a save.

    Args:
        points: operations per victim
        random: number of kills at random times in addition
    """
    run("kill", points=None if points == "all" else points, random=random, dense=dense)


@main.command
def flip(*, count: int = 1000, dense: Dense = "replicated") -> None:
    """Flip a random bit of a checkpoint.

    Args:
        count: how often
    """
    run("flip", count=count, dense=dense)


@main.command
def resume(*, steps: int | Literal["all"] = "all", dense: Dense = "replicated") -> None:
    """Resume from a step, on one rank and on two, with 0 and 2 data workers.

    Args:
        steps: number of steps to resume from
    """
    run("resume", steps=None if steps == "all" else steps, dense=dense)


@main.command
def reshard(*, dense: Literal["replicated", "all"] = "replicated") -> None:
    """Write in one layout, read in another.

    Args:
        dense: replicated: EP 1, 2, 4, 8; all: replicated, sharded and hybrid dense weights
    """
    run("reshard", dense=dense)


def run(what: str, **given: int | str | None) -> None:
    module = "interrupted" if what == "resume" else what
    print(json.dumps(getattr(import_module(f"scmoe.experiments.faults.{module}"), what)(**given)))


if __name__ == "__main__":
    sys.exit(call("faults", *sys.argv[1:]))
