"""Train a model, or resume a run. The last line on standard output is the run's summary as JSON.

Exit codes: 2, the request was wrong and nothing was started; 143 or 130, stopped by SIGTERM or Ctrl-C with a
checkpoint.
"""

import json
import sys
from pathlib import Path

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.experiments import called, command


def read(arguments: list[str]) -> tuple[Config, list[str], Path | None, int | None]:
    """Return the config, its overrides, and the run to resume (None: a new run) with the step (None: the newest)."""
    from scmoe.config.load import load

    if arguments and arguments[0] == "--resume":
        if len(arguments) < 2:
            raise ConfigError("--resume requires the directory of a run, such as runs/latest")
        run_dir = Path(arguments[1]).resolve()
        if not any(run_dir.glob("checkpoints/*")):
            raise ConfigError(f"--resume is {arguments[1]!r}, allowed: a run that has a checkpoint")
        from scmoe.training.run.resume import resumed_config, step_of

        step, overrides = step_of(arguments[2:])
        return resumed_config(run_dir, overrides, step), overrides, run_dir, step
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"no config given: {called('train')} CONFIG [key=value ...], see --help")
    return load(arguments[0], arguments[1:]), arguments[1:], None, None


@command
def main(arguments: list[str]) -> None:
    if "-h" in arguments or "--help" in arguments:
        from scmoe.config.help import help_text

        name = called("train")
        usage = f"usage: {name} CONFIG [key=value ...]\n       {name} --resume RUN_DIR [step=N] [key=value ...]\n"
        print(f"{usage}\n{__doc__}\n{help_text()}")
        return
    request = read(arguments)
    from scmoe.training.run.train import train

    summary = train(*request)
    if summary is not None:
        print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
