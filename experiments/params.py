"""`scmoe params` counts parameters."""

import json
import sys

from scmoe.experiments.engine.command_line import call


def main(*presets: str) -> None:
    """Count the parameters of presets and architectures, and show the paper's totals beside them.

    Standard output is JSON: {preset: {architecture: {"total": ..., "active": ...}}}; active parameters
    are those that one token uses.

    Args:
        presets: names of files in configs/model, without .yaml (default: all)
    """
    from scmoe.experiments.studies.parameters import ARCHITECTURES, PRESETS, count, parameters_table
    from scmoe.training.run.printout import console

    names = presets or sorted(path.stem for path in PRESETS.glob("*.yaml"))
    counts = {name: {architecture: count(name, architecture) for architecture in ARCHITECTURES} for name in names}
    console().print(parameters_table(counts))
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(call("params", *sys.argv[1:]))
