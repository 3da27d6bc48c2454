"""List the runs of a folder, the newest first: state, best loss, speed, and how their configs differ.

Best loss is the lowest val/loss; tokens/s is the summary's value, or the last logged one. "differs in" shows what
differs from more than half of the runs shown of the same experiment: those of one name, one sweep or one table.
"""

import sys
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("runs", __doc__)
    options.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where to look (default: runs)")
    options.add_argument("--last", type=int, default=30, help="how many of the newest (default: 30)")
    given = options.parse_args(arguments)
    from scmoe.studies.runs import console, find_runs, table_of

    if not given.folder.is_dir():
        raise ConfigError(f"the folder of runs is {str(given.folder)!r}, allowed: an existing folder")
    runs = find_runs(given.folder)
    shown = runs[: given.last]
    console().print(table_of(shown, given.folder), f"{len(shown)} of {len(runs)} runs in {given.folder}", sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
