"""`scmoe simulate` compares the simulator with reports of the benches.

A command imports what it needs inside itself, so that its help and a wrong request are answered at
once.
"""

import sys
from pathlib import Path

from cyclopts import App

from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.report import print_result

main = App(name="simulate", help="Compare the simulator with what was measured.")


@main.command
def testbed(folder: Path = Path("docs/figures"), /) -> None:
    """Predict reports of `bench overlap` from others, or from the times of their own sequential
    top-2. Standard output is JSON, but nothing at a terminal.

    What no report has measured is named with the command that measures it.

    Args:
        folder: reports of `bench overlap`, also in folders below it
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Name one with reports of `bench overlap`")
    from experiments.simulate.testbed import simulate_testbed

    print_result(simulate_testbed(folder))


@main.command
def others(file: Path = Path("docs/results/others.yaml"), /) -> None:
    """Predict measurements of other people's clusters as `scmoe advise` does. Standard output is
    JSON.

    Args:
        file: runs and cells, with their sources
    """
    from experiments.simulate.others import simulate_others

    print_result(simulate_others(file))


if __name__ == "__main__":
    sys.exit(call("simulate", *sys.argv[1:]))
