"""What the SLURM file and the commands of docs/clusters.md start: configs that load, for as many ranks as processes.

SLURM is simulated: a stand-in for srun notes its arguments. Nothing is trained.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from experiments.train import read

ROOT = Path(__file__).parents[2]
BATCH_FILE = ROOT / "experiments/train.sbatch"
PAGE = (ROOT / "docs/clusters.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
TORCHRUN = [line for line in COMMANDS if "torchrun" in line and "--resume" not in line]


def asked_for() -> dict[str, str]:
    """The file's #SBATCH lines, by the names of the variables that SLURM makes of them."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", BATCH_FILE.read_text(), re.MULTILINE)
    return {name.upper().replace("-", "_"): value for name, value in lines}


def simulated(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """The words that srun is called with."""
    srun, noted = folder / "srun", folder / "noted"
    srun.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {noted}\n")
    srun.chmod(0o755)
    asked = asked_for()
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": asked["NODES"]}
    slurm |= {f"SLURM_{name}": asked[name] for name in ("NTASKS_PER_NODE", "CPUS_PER_TASK")}
    env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | slurm | variables
    subprocess.run(["bash", str(BATCH_FILE), *arguments], env=env, check=True, timeout=60)
    return noted.read_text().splitlines()


def test_the_batch_file_starts_a_process_for_each_gpu(tmp_path):
    asked, words = asked_for(), simulated(tmp_path, "trainer.accumulate=2")
    assert asked["GPUS_PER_NODE"] == asked["NTASKS_PER_NODE"] and asked["JOB_NAME"] not in ("bash", "interactive")
    program = words.index("experiments.train")
    assert words[:program] == ["--kill-on-bad-exit=1", ".venv/bin/python", "-m"]
    trainer = read(words[program + 1 :])[0].trainer
    assert [str(n) for n in (trainer.devices, trainer.num_nodes, trainer.threads)] == [
        *(asked["NTASKS_PER_NODE"], asked["NODES"], asked["CPUS_PER_TASK"])
    ]
    assert trainer.accumulate == 2


def test_the_batch_file_takes_a_config_or_a_run(tmp_path):
    words = simulated(tmp_path, CONFIG="configs/experiment/swinv2_moe_s.yaml")
    assert read(words[words.index("experiments.train") + 1 :])[0].name == "swinv2_moe_s"
    words = simulated(tmp_path, RUN="runs/latest")
    assert words[words.index("experiments.train") + 1 :][:2] == ["--resume", "runs/latest"]


@pytest.mark.parametrize("command", TORCHRUN)
def test_torchrun_starts_as_many_processes_as_the_config_wants(command):
    words = shlex.split(command)
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    trainer = read(words[words.index("experiments.train") + 1 :])[0].trainer
    assert trainer.devices == int(options["nproc-per-node"]) and trainer.num_nodes == int(options.get("nnodes", 1))
