"""Draw a figure of the paper. The last line on standard output is JSON: the figure and its files.

    1   share of All-to-All in the time               reports of `bench overlap`, or their folder
    4   a pair of blocks with the shortcut            nothing
    7   two timelines by the cost model               nothing; make timeline measures all five
    8   speed-ups in three hardware scenarios         reports of `bench overlap`, or their folder
    9   gating over training                          a run with analysis.gating_every
    10  similarity of representations (also 14, 15)   a run with analysis.similarity_every

PNG and PDF go to the run's folder `analysis`, to the folder of the first report, or (4, 7; PNG only) to docs/figures.
"""

import json
import sys
from pathlib import Path

from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("figure", __doc__)
    options.add_argument("number", type=int, choices=(1, 4, 7, 8, 9, 10), help="the figure's number in the paper")
    options.add_argument("sources", nargs="*", help="what it is drawn from, as above")
    options.add_argument("--out", type=Path, help="folder of the files")
    given = options.parse_intermixed_args(arguments)
    from scmoe.config.extras import require

    require("figure", "matplotlib")
    from scmoe.studies.figures.draw import draw_figure

    files = draw_figure(given.number, given.sources, given.out)
    print(json.dumps({"figure": given.number, "files": [str(path) for path in files]}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
