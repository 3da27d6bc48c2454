"""A training is bit-identical under popen, spawn, fork, torchrun, and as two tasks of a simulated
SLURM job.

This file is also the program that they launch: `python -m tests.lightning.seam.test_launch
START_METHOD`.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import cache

import pytest
import torch

from experiments.engine.ranks import run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import seed_everything
from scmoe.training.callbacks.data_position import DataPosition
from tests.support.commands import ROOT, environment
from tests.support.forked import python
from tests.support.trainings import tiny, users_trainer

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

RANKS = 2
PROGRAM = ("-m", "tests.lightning.seam.test_launch")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")


class OneThread(DataPosition):
    """Sets the number of threads when training is set up: Lightning's launcher has set its own
    number before."""

    def setup(self, *_, **__) -> None:
        torch.set_num_threads(1)


def main(start_method: str) -> None:
    """Train; rank 0, or the process that started it, prints loss and gradient norm of the last
    step."""
    if ended := train(start_method):
        print(json.dumps(ended))


def train(start_method: str) -> dict[str, str]:
    """Take four steps on two ranks, with dropout and clipping. Return nothing on ranks other than
    0."""
    config = tiny("position=pos2 model.dropout=0.1 optim.warmup_steps=1 trainer.max_steps=4", RANKS)
    seed_everything(config.seed)
    strategy = ExpertParallelStrategy(timeout_s=60, start_method=start_method)
    how = {"precision": "64-true", "use_distributed_sampler": False, "limit_val_batches": 0}
    trainer = users_trainer(RANKS, strategy, max_steps=4, callbacks=[OneThread()], **how)
    trainer.fit(build_module(config), build_datamodule(config))
    assert trainer.global_step == 4, "in the process that has started the ranks, too"
    if not trainer.is_global_zero:
        return {}
    return {
        name: trainer.callback_metrics[name].item().hex()
        for name in ("train/loss", "train/grad_norm")
    }


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    env = environment(**variables)
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE
    )


def slurm_task(rank: int, port: int) -> subprocess.Popen[str]:
    """Start a task with the variables of `srun --ntasks-per-node=2` that Lightning reads."""
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NNODES": "1",
    }
    tasks = {"SLURM_NTASKS": str(RANKS), "SLURM_NTASKS_PER_NODE": str(RANKS), "SLURM_NODEID": "0"}
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": str(port)}
    return start(*PROGRAM, "popen", **job, **tasks, **place)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(launcher: str) -> dict[str, str]:
    """Return the exact loss and gradient norm of the last step."""
    if launcher == "slurm":
        port = free_port()
        runs = [slurm_task(rank, port) for rank in range(RANKS)]
    elif launcher == "torchrun":
        runs = [start(*TORCHRUN, *PROGRAM, "popen")]
    else:
        code, out, err = python(*PROGRAM, launcher, cwd=ROOT, env=environment(), timeout_s=240)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs)
    assert not "".join(said[1:]), "only rank 0 prints"
    return json.loads(said[0].splitlines()[-1])


def join(rank: int, world_size: int) -> dict[str, str]:
    return train("popen")


@cache
def joined() -> dict[str, str]:
    """Return the result of ranks that run already and have torchrun's variables."""
    ended, nothing = run_ranks(join, RANKS)
    assert not nothing
    return ended


@pytest.mark.parametrize(
    "launcher",
    ["popen", "spawn", pytest.param("fork", marks=pytest.mark.representative), "torchrun", "slurm"],
)
def test_training_is_bit_identical_under_every_launcher(launcher):
    assert end(launcher) == joined()
    assert 0 < float.fromhex(joined()["train/loss"]) < 10


if __name__ == "__main__":
    main(sys.argv[1])
