import json
from typing import Any

from scmoe.command_line import KeyValue
from scmoe.config.installation import require, scmoe
from scmoe.config.leaves import ConfigError
from scmoe.report import print_result, say


def run_here(sweep: Any, again: str) -> int:
    """Run a sweep on this machine and return the exit code. again: the command that resumes it."""
    require("sweep", "matplotlib")
    if sweep.method == "bayes":
        require("method bayes (grid and random do not)", "optuna")
    from scmoe.sweeps.sweep_report import table, write_report
    from scmoe.sweeps.trials import run_trials

    trials, signum = run_trials(sweep)
    summary = write_report(sweep, trials)
    table(sweep, trials).show()
    say(f"results      {sweep.folder}")
    if summary["best"]:
        say(f"best         {scmoe('train', summary['best']['config'])}")
    if signum:
        say(f"go on        {again}")
    print_result(summary)
    return 128 + signum if signum else 0 if summary["finished"] else 1


def main(file: str, /, *overrides: KeyValue, local: bool = False) -> int:
    """Search over parameters, as a W&B sweep file says: grid, random or bayes.

    With a W&B key the sweep is W&B's: it is created there, an agent starts here, and others may
    join from anywhere. Without a key, or with --local, the same file runs here; the same command
    resumes it. Standard output is then {"trials": .., "finished": .., "failed": .., "best": ..}.
    Exit codes: 2, the request was wrong and nothing was started; 1, no trial finished; 130 or 143,
    stopped.

    Args:
        file: a W&B sweep file, such as configs/sweep/lr.yaml
        overrides: key=value, for every trial
        local: run it here, also where there is a key
    """
    from scmoe.sweeps.sweep_file import read

    if wrong := [word for word in overrides if "=" not in word]:
        raise ConfigError(
            f"command line: {wrong[0]!r} is neither --local nor an override key=value"
        )
    sweep = read(file, overrides)
    if not local:
        from scmoe.training.run.wandb_logger import has_wandb_key

        if has_wandb_key():
            from scmoe.sweeps.trials import run_online

            path, code = run_online(sweep)
            print(json.dumps({"sweep": path, "exit_code": code}), flush=True)
            return code if code >= 0 else 128 - code
    return run_here(sweep, scmoe("sweep", file, "--local", *overrides))
