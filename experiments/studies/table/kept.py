"""What is kept of a finished run in its state file: all that a report reads, so it outlives the run's directory."""

import json
import math
from pathlib import Path
from typing import Any

from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.parallel.checkpoint.state import META
from scmoe.runs.seen import SeenRun


def results_of(run: SeenRun, digest: str) -> dict[str, Any]:
    """Return the results that a state keeps of a finished run. curve: points (steps done, validation loss)."""
    environment = json.loads((run.path / "env.json").read_text())
    last = int(run.config["trainer.max_steps"])  # after which the last validation is logged
    curve = {min(int(row["step"]) + 1, last): row["val/loss"] for row in run.metrics if "val/loss" in row}
    return {
        "digest": digest,
        "data": data_of(run.path),
        "summary": {key: value for key, value in run.summary.items() if key != "run_dir"},
        "curve": sorted(curve.items()),
        "environment": {
            "machine": f"{environment['cpus']} CPU cores, {environment['platform'].partition('-')[0]}",
            "torch": environment["packages"]["torch"],
            "git_commit": environment["git_commit"],
            "date": run.path.name[:8],
        },
    }


def data_of(run_dir: Path) -> str | None:
    """Return the digest of the data that a run has read, as its checkpoints have it; None: it has none."""
    metas = (read_meta(path) for path in sorted(run_dir.glob("checkpoints/*.ckpt")) if (path / META).exists())
    parts = (part for meta in metas for part in meta.values() if isinstance(part, dict))
    return next((str(part["data"]) for part in parts if "consumed_samples" in part), None)


def look_up(tree: Any, dotted: str) -> float | None:
    """Return the finite number under a dotted key of nested mappings; None: none. A name may have dots in it."""
    if not isinstance(tree, dict):
        return None
    if dotted in tree:
        found = tree[dotted]
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return float(found) if is_number and math.isfinite(found) else None
    below = (look_up(tree[key], dotted[len(key) + 1 :]) for key in tree if dotted.startswith(f"{key}."))
    return next((found for found in below if found is not None), None)
