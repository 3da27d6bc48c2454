"""Break checkpoints on purpose and count what survives (faults 1-10 of docs/faults.md). The last line is JSON."""

import json
import sys
from importlib import import_module

from scmoe.experiments import command, parser


def count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


@command
def main(arguments: list[str]) -> None:
    options = parser("faults", __doc__)
    verbs = options.add_subparsers(dest="what", required=True)
    verb = verbs.add_parser("kill", help="SIGKILL to rank 0, the last rank or all during a save")
    verb.add_argument("--points", type=count_or_all, help="operations per victim, or all (default: all)")
    verb.add_argument("--random", type=int, default=0, help="number of kills at random times in addition (default: 0)")
    verb = verbs.add_parser("flip", help="flip a random bit of a checkpoint")
    verb.add_argument("--count", type=int, default=1000, help="how often (default: 1000)")
    verb = verbs.add_parser("resume", help="resume from a step, on one rank and on two, with 0 and 2 data workers")
    verb.add_argument("--steps", type=count_or_all, help="number of steps to resume from, or all (default: all)")
    verb = verbs.add_parser("reshard", help="write in one layout, read in another")
    ways = "replicated: EP 1, 2, 4, 8; all: replicated, sharded and hybrid dense weights (default: replicated)"
    verb.add_argument("--dense", choices=("replicated", "all"), default="replicated", help=ways)
    for name in ("kill", "flip", "resume"):
        verbs.choices[name].add_argument("--dense", choices=("replicated", "sharded"), default="replicated")
    given = vars(options.parse_args(arguments))
    what = given.pop("what")
    run = getattr(import_module(f"scmoe.testbed.faults.{what}"), what)
    print(json.dumps(run(**given)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
