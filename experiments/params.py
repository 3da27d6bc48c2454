"""Count the parameters of presets and architectures, and show the paper's totals beside them.

The last line on standard output is JSON: {preset: {architecture: {"total": ..., "active": ...}}}; active parameters are
those that one token uses.
"""

import json
import sys
from pathlib import Path

from experiments import command, parser

PRESETS = Path("configs/model")


@command
def main(arguments: list[str]) -> int:
    options = parser("params", __doc__)
    options.add_argument("presets", nargs="*", help=f"names of files in {PRESETS}, without .yaml (default: all)")
    names = options.parse_args(arguments).presets or sorted(path.stem for path in PRESETS.glob("*.yaml"))
    from scmoe.studies.parameters import ARCHITECTURES, count, parameters_table
    from scmoe.training.run.report import console

    counts = {name: {architecture: count(name, architecture) for architecture in ARCHITECTURES} for name in names}
    console().print(parameters_table(counts))
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
