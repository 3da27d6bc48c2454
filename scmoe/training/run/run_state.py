"""The state of a run, in state.json of its directory: running, finished, failed or cut.

A killed process cannot write `cut`. It leaves `running` behind, with its id and start time; where that process no
longer exists, `running` is read as `cut`. Another machine cannot see the process, so a run touches its file while it
lives; on another machine it counts as running until the file has not been touched for SILENT_S.
"""

import json
import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.parallel.checkpoint.durable import start_of
from scmoe.training.files import write_json

FILE = "state.json"
BEAT_S, SILENT_S = 60.0, 600.0  # the second is longer than clocks of machines differ, and than a shared disk is away


def write_state(run_dir: Path, state: str) -> None:
    """Write the state of the run that this process makes."""
    process = {"pid": os.getpid(), "started": start_of(os.getpid()), "host": platform.node()}
    write_json(run_dir / FILE, {"state": state, **process})


def show_life(run_dir: Path) -> threading.Event:
    """Touch the state's file every BEAT_S, until the event that this returns is set."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with suppress(OSError):
                os.utime(run_dir / FILE)

    threading.Thread(target=beat, name="show-life", daemon=True).start()
    return ended


def read_state(run_dir: Path) -> str:
    """Return running, finished, failed or cut. An old run without state.json is finished if it has a summary."""
    if not (path := run_dir / FILE).exists():
        return "finished" if (run_dir / "summary.json").exists() else "cut"
    kept: dict[str, Any] = json.loads(path.read_text())
    gone = start_of(kept["pid"]) != kept["started"] if kept["host"] == platform.node() else _is_silent(path)
    return "cut" if kept["state"] == "running" and gone else kept["state"]


def refuse_running(run_dir: Path) -> None:
    """Raise ConfigError if another process is training this run: two would write the same files."""
    path = run_dir / FILE
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"state": "cut"}
    if kept["state"] != "running":
        return
    if kept["host"] != platform.node():
        if not _is_silent(path):
            raise ConfigError(
                f"process {kept['pid']} on {kept['host']} is training {run_dir}; stop it first, or, if it was killed, "
                f"wait {SILENT_S / 60:g} minutes from then on, or delete {path}"
            )
    elif kept["pid"] != os.getpid() and kept["started"] is not None and start_of(kept["pid"]) == kept["started"]:
        what = f"process {kept['pid']} is training {run_dir}"
        raise ConfigError(f"{what}, allowed: a run that no process is training; stop that process first")


def _is_silent(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > SILENT_S
