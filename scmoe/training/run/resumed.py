"""What a training knows of the run that it continues: its checkpoint, and what is after it.

resume.py finds the checkpoint and reads the configuration.
"""

import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from scmoe.files import read_json, relative
from scmoe.parallel.checkpoint.durable import BrokenCheckpoint, checkpoints, read_manifest


def set_aside_later(run_dir: Path, step: int) -> None:
    """Move checkpoints and configurations after this step to set-aside/ of the run.

    These steps are done again. Otherwise the next resumption would take one of them as the newest.
    """
    later = [
        path
        for path in run_dir.glob("config-from-*.yaml")
        if int(path.stem.rpartition("-")[2]) > step
    ]
    for path in checkpoints(run_dir / "checkpoints"):
        with suppress(BrokenCheckpoint):
            if read_manifest(path)["step"] > step:
                later.append(path)
    set_aside(run_dir, later)


def set_aside(run_dir: Path, paths: Sequence[Path]) -> None:
    """Move files or checkpoints to set-aside/ of the run."""
    for path in paths:
        aside = run_dir / "set-aside" / f"{path.name}-{uuid.uuid4().hex[:8]}"
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        print(f"set aside: {relative(path)} is now {relative(aside)}", file=sys.stderr, flush=True)


class Resumed(NamedTuple):
    """A run that goes on. step: the one that the user named; later ones are set aside. None: the
    newest."""

    run_dir: Path
    checkpoint: Path
    step: int | None


def record_path(run_dir: Path, step: int) -> Path:
    """Return where the configuration of a resumption from this step is kept."""
    return run_dir / f"config-from-{step}.yaml"


def summary_if_done(run: Resumed, last_step: int) -> dict[str, Any] | None:
    """Return the summary of a run that has done all its steps; None where steps or the summary are
    missing."""
    summary = read_json(run.run_dir / "summary.json")
    is_done = summary.get("steps") == last_step <= read_manifest(run.checkpoint)["step"]
    return summary if is_done and run.step is None else None
