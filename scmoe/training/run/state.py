"""The state of a run, in state.json of its directory: running, finished, failed or cut.

A killed process cannot write `cut`. It leaves `running` behind, with its id and start time; where that process no
longer exists, `running` is read as `cut`. A process on another machine cannot be checked and counts as running.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.parallel.checkpoint.durable import start_of
from scmoe.training.run.writing import write_json

FILE = "state.json"


def write_state(run_dir: Path, state: str) -> None:
    """Write the state of the run that this process makes."""
    process = {"pid": os.getpid(), "started": start_of(os.getpid()), "host": platform.node()}
    write_json(run_dir / FILE, {"state": state, **process})


def read_state(run_dir: Path) -> str:
    """Return running, finished, failed or cut. An old run without state.json is finished if it has a summary."""
    if not (path := run_dir / FILE).exists():
        return "finished" if (run_dir / "summary.json").exists() else "cut"
    kept: dict[str, Any] = json.loads(path.read_text())
    gone = kept["host"] == platform.node() and start_of(kept["pid"]) != kept["started"]
    return "cut" if kept["state"] == "running" and gone else kept["state"]


def refuse_running(run_dir: Path) -> None:
    """Raise ConfigError if another process on this machine is training this run: two would write the same files."""
    path = run_dir / FILE
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"state": "cut"}
    if kept["state"] != "running" or kept["host"] != platform.node() or kept["pid"] == os.getpid():
        return
    if kept["started"] is not None and start_of(kept["pid"]) == kept["started"]:
        what = f"process {kept['pid']} is training {run_dir}"
        raise ConfigError(f"{what}, allowed: a run that no process is training; stop that process first")
