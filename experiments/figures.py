"""Draw the figures of the README and docs into docs/figures."""

import sys
from pathlib import Path

from experiments import command, parser

FOLDER = Path("docs/figures")


@command
def main(arguments: list[str]) -> None:
    parser("figures", __doc__).parse_args(arguments)
    from scmoe.studies.figures import pair, timelines

    timelines(FOLDER / "timelines.png")
    pair(FOLDER / "pair.png")
    print(f"drawn: {FOLDER / 'timelines.png'}, {FOLDER / 'pair.png'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
