"""What has become of a run: state.json in its directory says running, finished, failed or cut.

A process that is killed cannot say so. It leaves `running` behind, with its id and start: who reads that where no such
process is any more reads `cut`. On another machine `running` is believed.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from scmoe.training.run.steady import try_to_write

FILE = "state.json"


def write_state(run_dir: Path, state: str) -> None:
    """Of the run that this process makes; in one step for anyone who looks."""
    process = {"pid": os.getpid(), "started": _start(os.getpid()), "host": platform.node()}
    text = json.dumps({"state": state, **process}) + "\n"
    try_to_write(run_dir / FILE, lambda path: path.write_text(text))


def read_state(run_dir: Path) -> str:
    """running, finished, failed or cut. A run from before there were states is finished if it has a summary."""
    path = run_dir / FILE
    if not path.exists():
        return "finished" if (run_dir / "summary.json").exists() else "cut"
    kept: dict[str, Any] = json.loads(path.read_text())
    here = kept["host"] == platform.node()
    gone = here and _start(kept["pid"]) != kept["started"]
    return "cut" if kept["state"] == "running" and gone else kept["state"]


def _start(pid: int) -> str | None:
    """When the process began, in clock ticks since the machine did; None if there is none or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
