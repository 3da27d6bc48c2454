"""Train a language model: `python -m experiments.train CONFIG [key=value ...]`, or `--resume RUN_DIR [key=value ...]`.

The last line on standard output is the run's summary as JSON. Exit code 2: the request was wrong, nothing was started.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scmoe.config.fields import Config, ConfigError
from scmoe.config.help import help_text
from scmoe.config.load import load
from scmoe.parallel.checkpoint.durable import checkpoints

USAGE = """\
usage: python -m experiments.train CONFIG [key=value ...]
       python -m experiments.train --resume RUN_DIR [key=value ...]
"""


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(f"{USAGE}\n{help_text()}")
        return 0
    try:
        config, overrides, run_dir = read(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from scmoe.training.run.train import train  # here: a wrong request is answered without waiting for torch

    try:
        summary = train(config, overrides, run_dir)
    except ConfigError as error:  # what only starting could tell, such as a W&B server that does not answer
        print(f"error: {error}", file=sys.stderr)
        return 2
    if summary is not None:
        print(json.dumps(summary), flush=True)
    return 0


def read(arguments: list[str]) -> tuple[Config, list[str], Path | None]:
    """The config, its overrides, and the directory of the run to go on with (None: a new run)."""
    if arguments and arguments[0] == "--resume":
        if len(arguments) < 2:
            raise ConfigError("--resume wants the directory of a run, such as runs/latest")
        run_dir = Path(arguments[1]).resolve()
        if not checkpoints(run_dir / "checkpoints"):
            raise ConfigError(f"--resume is {arguments[1]!r}, which has no checkpoint to go on from")
        return load(run_dir / "config.yaml", arguments[2:]), arguments[2:], run_dir
    if not arguments or "=" in arguments[0]:
        raise ConfigError("no config given: python -m experiments.train CONFIG [key=value ...], see --help")
    return load(arguments[0], arguments[1:]), arguments[1:], None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
