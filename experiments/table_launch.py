"""Launch files for runs that are made elsewhere: all of a table's runs for torchrun, or for SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.table_runs import Run

TORCHRUN = """\
#!/bin/bash
# {title} for one machine with {devices} GPUs, one run after the other. From the repository's folder: bash {path}
# A run that was cut goes on with: torchrun ... -m experiments.train --resume RUN_DIR
set -uo pipefail
"""
SLURM = """\
#!/bin/bash
# {title} for a cluster: a job for each run, of {devices} GPUs on one node. From the repository's folder: bash {path}
# What a cluster must have is told in experiments/train.sbatch and docs/clusters.md.
set -euo pipefail
"""


def write_launch_files(runs: Sequence[Run], folder: Path) -> list[str]:
    """torchrun.sh and slurm.sh in the table's folder. Returns the commands that start them."""
    devices, config = runs[0].config.trainer.devices, str(runs[0].config_file)
    folder.mkdir(parents=True, exist_ok=True)
    torchrun, slurm = [], []
    for run in runs:
        words = [shlex.quote(word) for word in run.overrides]
        torchrun.append(
            f".venv/bin/torchrun --standalone --nproc-per-node={devices} -m experiments.train {shlex.join([config])} "
            + " ".join(words)
        )
        slurm.append(
            f"CONFIG={shlex.quote(config)} sbatch --nodes=1 --ntasks-per-node={devices} --gpus-per-node={devices} "
            f"--job-name={run.name} experiments/train.sbatch " + " ".join(words)
        )
    commands = []
    for name, head, lines in (("torchrun.sh", TORCHRUN, torchrun), ("slurm.sh", SLURM, slurm)):
        path = folder / name
        path.write_text(head.format(title=f"{folder.name}: {len(runs)} runs", devices=devices, path=path))
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        commands.append(f"bash {path}")
    return commands
