"""Count the parameters of presets and architectures, and show the paper's totals beside them.

The last line on standard output is JSON: {preset: {architecture: {"total": ..., "active": ...}}}; active parameters are
those that one token uses.
"""

import json
import sys

from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("params", __doc__)
    options.add_argument("presets", nargs="*", help="names of files in configs/model, without .yaml (default: all)")
    given = options.parse_args(arguments)
    from scmoe.studies.parameters import ARCHITECTURES, PRESETS, count, parameters_table
    from scmoe.training.run.report import console

    names = given.presets or sorted(path.stem for path in PRESETS.glob("*.yaml"))
    counts = {name: {architecture: count(name, architecture) for architecture in ARCHITECTURES} for name in names}
    console().print(parameters_table(counts))
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
