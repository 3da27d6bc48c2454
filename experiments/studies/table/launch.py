"""Launch files for a table whose runs happen elsewhere: all its runs for torchrun, or for SLURM."""

import shlex
from collections.abc import Iterator, Sequence

from scmoe.experiments.dryrun.estimated import estimate
from scmoe.experiments.studies.table.rows import Table
from scmoe.experiments.studies.table.table_runs import Run

TORCHRUN = """\
#!/bin/bash
# {title} for one machine with {devices} GPUs, one run after the other. From the repository's folder: bash {path}
# Resume an interrupted run with: torchrun ... -m experiments.resume RUN_DIR
set -uo pipefail
"""
SLURM = """\
#!/bin/bash
# {title} for a cluster: a job for each run, of {devices} GPUs on one node. From the repository's folder: bash {path}
# experiments/train.sbatch and docs/clusters.md say what a cluster must have.
set -euo pipefail
"""


def write_launch_files(runs: Sequence[Run]) -> list[str]:
    """Write torchrun.sh and slurm.sh into the table's folder. Returns the commands that start them."""
    folder, devices, config = runs[0].job.study, runs[0].config.trainer.devices, shlex.quote(runs[0].job.arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = f".venv/bin/torchrun --standalone --nproc-per-node={devices} -m experiments.train {config}"
    sbatch = f"CONFIG={config} sbatch --nodes=1 --ntasks-per-node={devices} --gpus-per-node={devices}"
    commands = []
    for name, head in (("torchrun.sh", TORCHRUN), ("slurm.sh", SLURM)):
        path = folder / name
        lines = [head.format(title=f"{folder.name}: {len(runs)} runs", devices=devices, path=path)]
        for run in runs:
            start = torchrun if head is TORCHRUN else f"{sbatch} --job-name={run.job.name} experiments/train.sbatch"
            lines.append(f"{start} {shlex.join(run.job.arguments[1:])}\n")
        path.write_text("".join(lines))
        commands.append(f"bash {path}")
    return commands


def check_memory(table: Table, runs: Sequence[Run], gpu_gib: float) -> Iterator[tuple[str, bool]]:
    """Yield for each row a line with what `make estimate` says of its run, and whether it fits a GPU of that memory."""
    for run in runs[: len(table.rows)]:
        trainer, data, facts = run.config.trainer, run.config.data, estimate(run.config)
        samples = trainer.max_steps * data.global_batch_size
        seen = samples if facts["unit"] == "image" else samples * data.seq_len
        gib, flops = facts["memory_bytes"]["total"] / 2**30, facts["flops_training"] * seen
        fits = gib <= gpu_gib
        does = "fits" if fits else "does not fit"
        size = f"{facts['params_total'] / 1e9:.2f}B parameters, {flops:.2g} FLOPs"
        yield f"{run.row.name}: {size}, {gib:.0f} GiB of a GPU: {does} {gpu_gib:g} GiB", fits
