"""This module runs commands such as the train command in a process of their own, and reads what they leave."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SUMMARY = (
    "run_dir val_loss perplexity bits_per_byte unigram_bits_per_byte tokens_per_s steps params_total params_active "
    "ep_size world_size drop_share load_max_ratio"
)
EXACT = ("moe.capacity_factor=null", "moe.noisy=false")  # what is dropped, and noise, depend on the number of ranks
CANARY = "0123456789abcdef" * 2 + "canary00"  # as long as a key
TRAIN = ("-m", "experiments.train")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *TRAIN)


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])


def run(*arguments: str, **variables: str) -> Done:
    """Runs Python with these arguments in the repository's root, without the variables of tests or of a W&B account."""
    private = ("WANDB_", "TORCHELASTIC_", "MASTER_", "PYTEST_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    env = {k: v for k, v in os.environ.items() if not k.startswith(private) and k not in names}
    env |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def rows_of(metrics: Path) -> list[dict[str, str]]:
    """Returns the rows of a metrics.csv without empty cells; a metric's column is empty until it is first logged."""
    with metrics.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
