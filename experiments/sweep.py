"""Search over parameters, as a W&B sweep file says.

With a W&B key the sweep is W&B's: it is created there, an agent starts here, and others may join from anywhere.
Without a key, or with --local, the same file runs here; the same command resumes it. The last line on standard output
is then {"trials": .., "finished": .., "failed": .., "best": ..}.
Exit codes: 2, the request was wrong and nothing was started; 1, no trial finished; 130 or 143, stopped.
"""

import json
import shlex
import sys
from typing import Any

from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser


def run_here(sweep: Any, again: str) -> int:
    """again: the command that resumes this one where it is stopped."""
    require("sweep", "matplotlib")
    if sweep.method == "bayes":
        require("method bayes (grid and random do not)", "optuna")
    from scmoe.studies.runs import console
    from scmoe.studies.sweep.report import rich_table, write_report
    from scmoe.studies.sweep.trials import run_trials

    trials, signum = run_trials(sweep)
    summary, screen = write_report(sweep, trials), console()
    screen.print(rich_table(sweep, trials))
    lines = [f"results      {sweep.folder}"]
    if summary["best"]:
        lines.append(f"best         make train CONFIG={summary['best']['config']}")
    if signum:
        lines.append(f"go on        {again}")
    screen.print(*lines, sep="\n", soft_wrap=True, markup=False, highlight=False)  # a path may hold brackets
    print(json.dumps(summary), flush=True)
    return 128 + signum if signum else 0 if summary["finished"] else 1


@command
def main(arguments: list[str]) -> int:
    options = parser("sweep", __doc__)
    options.add_argument("file", metavar="FILE", help="a W&B sweep file, such as configs/sweep/lr.yaml")
    options.add_argument("--local", action="store_true", help="run it here, also where there is a key")
    options.add_argument("overrides", metavar="key=value", nargs="*", help="for every trial")
    given, unknown = options.parse_known_intermixed_args(arguments)  # --key=value is an override too
    given.overrides += unknown
    from scmoe.studies.sweep.sweep_file import read

    if wrong := [word for word in given.overrides if "=" not in word]:
        raise ConfigError(f"command line: {wrong[0]!r}, allowed: --local, key=value")
    sweep = read(given.file, given.overrides)
    if not given.local:
        from scmoe.training.run.wandb_logger import has_wandb_key

        if has_wandb_key():
            from scmoe.studies.sweep.wandb_sweep import run_online

            path, code = run_online(sweep, lambda line: print(line, flush=True))
            print(json.dumps({"sweep": path, "exit_code": code}), flush=True)
            return code if code >= 0 else 128 - code
    again = shlex.quote(shlex.join(["--local", *given.overrides]))
    return run_here(sweep, f"make sweep CONFIG={shlex.quote(given.file)} ARGS={again}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
