"""Fault 12: after SIGTERM to either rank of a real run, or to both, the run ends with exit code 143.

It leaves one complete checkpoint of one step and can be resumed.
"""

import os
import signal
import subprocess
import sys

import pytest

from scmoe.parallel.checkpoint.durable import newest_good, verify
from tests.support.commands import rows_of, train_in_ranks

pytestmark = [pytest.mark.smoke, pytest.mark.dist, pytest.mark.faults]

RUN = [sys.executable, "-m", "experiments.train", "configs/debug.yaml", "trainer.devices=2"]
PATIENCE_S = 60.0  # the docs promise 10 s on a machine without other work
ENDLESS = ["trainer.max_steps=1000000", "trainer.val_every=1000000", "trainer.checkpoint_every=1000000"]


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


@pytest.mark.parametrize("ranks", ((0,), pytest.param((1,), marks=pytest.mark.representative), (0, 1)))
def test_12_a_run_that_receives_sigterm_saves_and_exits_with_143(tmp_path, ranks):
    command = [*RUN, *ENDLESS, "trainer.log_every=1", f"runs_dir={tmp_path}"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step 3/") for line in run.stderr), "the run does not train"
        (other,) = children(run.pid)
        for rank in ranks:
            os.kill((run.pid, other)[rank], signal.SIGTERM)
        out, _ = run.communicate(timeout=PATIENCE_S)
    finally:
        run.kill()
    assert run.returncode == 143, out
    assert "make resume" in out.splitlines()[-1]
    checkpoints = tmp_path / "latest" / "checkpoints"
    step = verify(newest_good(checkpoints))
    assert [path.name for path in checkpoints.iterdir()] == [f"step={step}.ckpt"]
    resumed = train_in_ranks(2, "--resume", str(tmp_path / "latest"), f"trainer.max_steps={step + 2}")
    assert resumed.summary["steps"] == step + 2
    rows = rows_of(tmp_path / "latest" / "metrics.csv")
    assert [int(row["step"]) for row in rows if "train/loss" in row] == list(range(step + 2))
