"""The SLURM file and the commands of the pages on GPUs start configs that load, with one process
for each rank.

SLURM is simulated: a fake srun records its arguments. Nothing is trained.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from scmoe.config.fields import Config
from scmoe.config.load import load_config

ROOT = Path(__file__).parents[2]
BATCH_FILE = ROOT / "experiments/train.sbatch"
PAGE = (ROOT / "docs/ranks.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.splitlines()))
TORCHRUN = [line for line in COMMANDS if "torchrun" in line and "-m scmoe train" in line]


def sbatch_options() -> dict[str, str]:
    """Return the values of the file's #SBATCH lines, under the names of SLURM's variables."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", BATCH_FILE.read_text(), re.MULTILINE)
    return {name.upper().replace("-", "_"): value for name, value in lines}


def config_of(words: list[str]) -> Config:
    return load_config(words[0], words[1:])


def simulated(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Return the arguments of srun."""
    srun, recorded = folder / "srun", folder / "arguments"
    srun.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {recorded}\n")
    srun.chmod(0o755)
    options = sbatch_options()
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": options["NODES"]}
    slurm |= {f"SLURM_{name}": options[name] for name in ("NTASKS_PER_NODE", "CPUS_PER_TASK")}
    env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | slurm | variables
    subprocess.run(["bash", str(BATCH_FILE), *arguments], env=env, check=True, timeout=60)
    return recorded.read_text().splitlines()


def test_the_batch_file_starts_a_process_for_each_gpu(tmp_path):
    options, words = sbatch_options(), simulated(tmp_path, "trainer.accumulate=2")
    assert options["GPUS_PER_NODE"] == options["NTASKS_PER_NODE"] and options["JOB_NAME"] not in (
        "bash",
        "interactive",
    )
    program = words.index("train")
    waiting = ["--kill-on-bad-exit=0", "--wait=120"]  # rank 0 closes loggers after the others
    assert words[:program] == [*waiting, ".venv/bin/python", "-m", "scmoe"]
    assert "#SBATCH --no-requeue\n" in BATCH_FILE.read_text()
    trainer = config_of(words[program + 1 :]).trainer
    assert [str(n) for n in (trainer.devices, trainer.num_nodes, trainer.threads)] == [
        *(options["NTASKS_PER_NODE"], options["NODES"], options["CPUS_PER_TASK"])
    ]
    assert trainer.accumulate == 2


def test_the_batch_file_takes_a_config_or_a_run(tmp_path):
    words = simulated(tmp_path, CONFIG="configs/experiment/swinv2_moe_s.yaml")
    assert config_of(words[words.index("train") + 1 :]).name == "swinv2_moe_s"
    words = simulated(tmp_path, RUN="runs/latest")
    assert words[words.index("resume") + 1 :][:1] == ["runs/latest"]


@pytest.mark.parametrize("command", TORCHRUN)
def test_torchrun_starts_as_many_processes_as_the_config_requires(command):
    words = shlex.split(command)
    options = dict(
        word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--")
    )
    trainer = config_of(words[words.index("train") + 1 :]).trainer
    assert trainer.devices == int(options["nproc-per-node"]) and trainer.num_nodes == int(
        options.get("nnodes", 1)
    )
