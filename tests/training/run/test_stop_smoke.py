"""Fault 12: after SIGTERM to either rank of a real run, to both, or Ctrl-C, the run ends with exit
code 143 or 130.

It leaves one complete checkpoint of one step and can be resumed.
"""

import os
import signal

import pytest

from scmoe.config.installation import scmoe
from scmoe.parallel.checkpoint.durable import newest_good, verify
from tests.support.commands import TRAIN, children, resume_in_ranks, rows_of, running

pytestmark = [pytest.mark.smoke, pytest.mark.ranks, pytest.mark.faults]

RUN = (*TRAIN, "configs/debug.yaml", "trainer.devices=2", "trainer.log_every=1")
PATIENCE_S = 60.0  # the docs promise 10 s on a machine without other work
ENDLESS = (
    "trainer.max_steps=1000000",
    "trainer.val_every=1000000",
    "trainer.checkpoint_every=1000000",
)


@pytest.mark.parametrize("ranks", ((0,), (1,), (0, 1), "ctrl-c"))
def test_a_run_that_is_stopped_saves_and_exits_with_the_signals_code(tmp_path, ranks):
    with running(*RUN, *ENDLESS, f"runs_dir={tmp_path}") as run:
        assert any(line.startswith("step 3/") for line in run.stderr), "the run does not train"
        (other,) = children(run.pid)
        if ranks == "ctrl-c":
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        else:
            for rank in ranks:
                os.kill((run.pid, other)[rank], signal.SIGTERM)
        out, err = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == (130 if ranks == "ctrl-c" else 143), err
    assert f"to continue: {scmoe('resume', tmp_path)}" in err and not out
    checkpoints = tmp_path / "latest" / "checkpoints"
    step = verify(newest_good(checkpoints))
    assert [path.name for path in checkpoints.iterdir()] == [f"step={step}.ckpt"]
    resumed = resume_in_ranks(2, str(tmp_path / "latest"), f"trainer.max_steps={step + 2}")
    assert resumed.summary["steps"] == step + 2
    rows = rows_of(tmp_path / "latest" / "metrics.csv")
    assert [int(row["step"]) for row in rows if "train/loss" in row] == list(range(step + 2))
