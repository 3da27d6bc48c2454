"""Draw a figure of the paper, or all of the docs. The last line on standard output is JSON: the figure and its files.

    1   share of All-to-All in the time               reports of `bench overlap`, or their folder
    4   a pair of blocks with the shortcut            nothing
    7   two timelines by the cost model               nothing; make timeline measures all five
    8   speed-ups in three hardware scenarios         reports of `bench overlap`, or their folder
    9   gating over training                          a run with analysis.gating_every
    10  similarity of representations (also 14, 15)   a run with analysis.similarity_every
    0   all pictures of the docs                      the reports that are kept in docs/figures and docs/results

PNG and PDF go to the folder `analysis` of the run, to that of the first report, or (0, 4, 7; PNG) to docs/figures.
9 and 10 also write what they draw, as JSON.
"""

import json
import sys
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("figure", __doc__)
    options.add_argument("number", type=int, choices=(0, 1, 4, 7, 8, 9, 10), help="its number in the paper, or 0")
    options.add_argument("sources", nargs="*", help="what it is drawn from, as above")
    options.add_argument("--out", type=Path, help="folder of the files")
    given = options.parse_intermixed_args(arguments)
    if given.number == 0 and given.sources:
        raise ConfigError(f"0 is drawn from {given.sources[0]!r}, allowed: nothing; its reports are in docs/figures")
    from scmoe.config.extras import require

    require("figure", "matplotlib")
    from scmoe.studies.figures.draw import draw_figure
    from scmoe.studies.figures.pages import draw_pictures

    number, sources, out = given.number, given.sources, given.out
    files = draw_figure(number, sources, out) if number else draw_pictures(out)
    print(json.dumps({"figure": number, "files": [str(path) for path in files]}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
