"""A sweep at Weights & Biases, which needs a key: the server proposes trials, an agent on this machine runs them."""

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from scmoe.config.leaves import ConfigError
from scmoe.experiments.studies.sweep.sweep_file import Sweep

# The agent calls `python`, which must be this interpreter, and keeps its notes in the sweep's folder.
SETTINGS = 'PATH="$0:$PATH"; export PATH WANDB_DIR="$1"; shift; exec "$@"'


def run_online(sweep: Sweep, say: Callable[[str], None]) -> tuple[str, int]:
    """Create the sweep at W&B and run an agent, which takes trials until the server has no more.

    say: receives the commands that create such a sweep, join it and resume it. Returns the sweep's path at W&B and an
    exit code. Raises ConfigError where W&B does not take the sweep.
    """
    import wandb

    from scmoe.training.run.wandb_logger import wandb_mode, wandb_project

    if (mode := wandb_mode(sweep.base)) not in ("auto", "online"):
        allowed = "with a key: auto | online; or --local"
        raise ConfigError(f"logger.mode is {mode!r}, W&B would see no trial, allowed {allowed}")
    project = sweep.raw.get("project") or wandb_project(sweep.base)
    try:
        entity = sweep.raw.get("entity") or sweep.base.logger.entity or wandb.Api().default_entity
        with redirect_stdout(sys.stderr):
            sweep_path = f"{entity}/{project}/{wandb.sweep(sweep.raw, entity, project)}"
    except (wandb.Error, OSError, ValueError) as error:  # ValueError: the answer is none that wandb can read
        raise ConfigError(f"Weights & Biases takes no sweep, allowed here: --local: {error}") from error
    sweep.folder.mkdir(parents=True, exist_ok=True)
    given, join = sweep.folder / "sweep.yaml", f"PATH=$PWD/.venv/bin:$PATH wandb agent {sweep_path}"
    given.write_text(yaml.safe_dump(sweep.raw, sort_keys=False))
    say(f"the sweep was created at W&B, as by:\n    wandb sweep --entity {entity} --project {project} {given}")
    say(f"agents may join from other machines, each in its copy of this folder, with:\n    {join}")
    agent = [sys.executable, "-m", "wandb", "agent", "--forward-signals", sweep_path]
    places = [str(Path(sys.executable).parent), str(sweep.folder.absolute())]
    command = ["/bin/sh", "-c", SETTINGS, *places, *agent]
    process = subprocess.Popen(command, stdout=2, start_new_session=True)  # 2: standard error, for summaries of trials
    stopped: list[int] = []

    def stop(signum: int, _: Any) -> None:
        stopped.append(signum)
        process.terminate()  # the agent sends it to its trial, which saves; at a second signal it waits no longer

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = process.wait()
    if stopped:
        code = 128 + stopped[0]
        say(f"go on        {join}")
    return sweep_path, code
