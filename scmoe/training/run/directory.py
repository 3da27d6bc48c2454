"""The directory of a run: what it is called, and what is needed to run it again.

    runs/<experiment>/<stamp>-<slug>/   config.yaml  overrides.txt  env.json  metrics.csv  summary.json
                                        checkpoints/  wandb/  wandb_run.json  state.json
    runs/latest                         the newest

Only rank 0 writes. Without room for its config a run does not start.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scmoe.training.run import redact
from scmoe.training.run.steady import write_aside


def create_run_dir(root: Path, experiment: str, overrides: Sequence[str], config_yaml: str) -> Path:
    """A new directory for a run, with all that is needed to run it again, but for keys."""
    overrides = without_keys(overrides)
    pairs = [o.removeprefix("--").partition("=")[::2] for o in overrides]
    told = [f"{key.rpartition('.')[2]}-{value}" for key, value in pairs if key not in ("name", "runs_dir")]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(told))[:40].strip("-.")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = root / experiment / f"{stamp}-{slug or uuid.uuid4().hex[:4]}"
    while run_dir.exists():
        run_dir = run_dir.with_name(f"{stamp}-{slug}-{uuid.uuid4().hex[:4]}")
    run_dir.mkdir(parents=True)
    write_config(run_dir, config_yaml)
    (run_dir / "overrides.txt").write_text("".join(f"{o}\n" for o in overrides))
    (run_dir / "env.json").write_text(json.dumps(environment(), indent=2))
    point_latest(root, run_dir)
    return run_dir


def write_config(run_dir: Path, config_yaml: str) -> None:
    """OSError: the disk is full or the like; a config that was there is whole."""
    write_aside(run_dir / "config.yaml", lambda path: path.write_text(config_yaml))


def point_latest(root: Path, run_dir: Path) -> None:
    """runs/latest -> run_dir, in one step for anyone who looks."""
    fresh = root / f".latest-{uuid.uuid4().hex[:8]}"
    fresh.symlink_to(run_dir.resolve().relative_to(root.resolve()))
    os.replace(fresh, root / "latest")


def environment() -> dict[str, Any]:
    """Command line, versions, machine and the state of the code. No environment variables: they hold keys, which are
    starred out of the rest."""
    packages = {}
    for name in ("scmoe", "torch", "lightning", "omegaconf", "wandb", "numpy", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": without_keys([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": without_keys(_git("diff", "HEAD")),
    }


def without_keys(value: Any) -> Any:
    """A text, a config or the like as it may be kept; see redact.py."""
    return redact.without_keys(value, os.environ)


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
