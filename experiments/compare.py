"""Compare runs: their curves over the tokens (images) they saw, and how their configs differ.

The last line on standard output is the path of the picture.
"""

import sys
from pathlib import Path

from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("compare", __doc__)
    options.add_argument("runs", nargs="+", help="directories of runs, or their paths below runs/")
    options.add_argument("--out", type=Path, default=Path("runs/compare.png"), help="picture (default: %(default)s)")
    given = options.parse_intermixed_args(arguments)
    from scmoe.config.extras import require
    from scmoe.studies.runs import console, open_run

    require("compare", "matplotlib")
    runs = [open_run(name) for name in given.runs]
    from scmoe.studies.compare import differences_table, draw, results_table

    letters = [chr(ord("a") + i) if i < 26 else str(i + 1) for i in range(len(runs))]
    console().print(results_table(runs, letters), differences_table(runs, letters), sep="\n")
    draw(runs, letters, given.out)
    print(given.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
