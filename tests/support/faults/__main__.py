"""`python -m tests.support.faults` breaks checkpoints on purpose."""

import json
from typing import Literal

from cyclopts import App

Dense = Literal["replicated", "sharded"]
main = App(
    name="faults",
    help=(
        "Break checkpoints on purpose, count what survives (faults 1-10 of"
        " docs/troubleshooting.md). Standard output is JSON."
    ),
)


@main.command
def kill(
    *, points: int | Literal["all"] = "all", random: int = 0, dense: Dense = "replicated"
) -> None:
    """Send SIGKILL to rank 0, the last rank or all ranks during a save.

    Args:
        points: operations per victim
        random: number of kills at random times in addition
    """
    from tests.support.faults import damaged

    print(json.dumps(damaged.kill(None if points == "all" else points, random, dense)))


@main.command
def flip(*, count: int = 1000, dense: Dense = "replicated") -> None:
    """Flip a random bit of a checkpoint.

    Args:
        count: how often
    """
    from tests.support.faults import damaged

    print(json.dumps(damaged.flip(count, dense)))


@main.command
def resume(*, steps: int | Literal["all"] = "all", dense: Dense = "replicated") -> None:
    """Resume from a step, on one rank and on two, with 0 and 2 data workers.

    Args:
        steps: number of steps to resume from
    """
    from tests.support.faults import restored

    print(json.dumps(restored.resume(None if steps == "all" else steps, dense=dense)))


@main.command
def reshard(*, dense: Literal["replicated", "all"] = "replicated") -> None:
    """Write in one layout, read in another.

    Args:
        dense: replicated: EP 1, 2, 4, 8; all: replicated, sharded and hybrid dense weights
    """
    from tests.support.faults import restored

    print(json.dumps(restored.reshard(restored.EP if dense == "replicated" else restored.ALL)))


if __name__ == "__main__":
    main()
