"""Fault 32: trouble with W&B, or a disk without space for logs and figures, does not end a run."""

from __future__ import annotations

import json
import sys

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.training.run import loggers, wandb_logger
from tests.support.commands import CANARY, rows_of, run

pytestmark = [pytest.mark.faults]
NO_SERVER = "http://127.0.0.1:9"  # no server listens at the port `discard`


@pytest.mark.slow
def test_online_without_a_server_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", NO_SERVER)
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 1.0)
    with pytest.raises(
        ConfigError, match=r"^logger.mode is online, allowed here: offline \| disabled: "
    ):
        loggers.build_loggers(
            load_config(None, ["logger.mode=online"]), tmp_path, resumed_step=None
        )


@pytest.mark.slow
def test_a_killed_wandb_process_does_not_end_the_run(tmp_path, capsys):
    """This runs in its own process, because W&B has one service for all runs of a process."""
    done = run("-c", KILLED, str(tmp_path))
    assert done.code == 0, done.err
    assert "went on" in done.out
    assert done.err.count("warning: Weights & Biases receives nothing more of this run") == 1


KILLED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from scmoe.config.load import load_config
from scmoe.training.run.loggers import build_loggers, close_loggers
loggers = build_loggers(load_config(None, ["logger.mode=offline"]), Path(sys.argv[1]), None)
loggers[1].log_metrics({"a": 1.0}, 0)
children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout
for pid in children.split():
    command = Path(f"/proc/{pid}/cmdline")
    if command.exists() and "wandb-core" in command.read_text():
        os.kill(int(pid), signal.SIGKILL)
time.sleep(1)
for step in range(1, 5):
    for logger in loggers:
        logger.log_metrics({"a": 1.0}, step)
close_loggers(loggers)
print("went on")
"""


@pytest.mark.slow
def test_a_full_disk_ends_no_run_that_logs(tmp_path):
    """No file can grow beyond 8 kB, W&B's or ours, until there is space again."""
    done = run("-c", FULL, str(tmp_path))
    assert done.code == 0, done.err
    assert "went on" in done.out
    assert (
        done.err.count("metrics.csv cannot be written, its rows stay in memory: File too large")
        == 1
    )
    rows = rows_of(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(2000)), (
        "rows are kept until there is space"
    )
    assert all(row["a"] == "1.0" for row in rows)
    assert [int(row["step"]) for row in rows if "late" in row] == [1500], "a new column is kept too"


FULL = """
import resource, sys
from pathlib import Path
from scmoe.config.load import load_config
from scmoe.training.run.loggers import build_loggers, close_loggers
_, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limit))
loggers = build_loggers(load_config(None, ["logger.mode=offline"]), Path(sys.argv[1]), None)
for step in range(2000):
    for logger in loggers:
        logger.log_metrics({"a": 1.0} | ({"late": 2.0} if step == 1500 else {}), step)
    if step == 1900:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
close_loggers(loggers)
print("went on")
"""


@pytest.mark.slow
def test_a_run_on_a_full_disk_loses_its_figures_and_ends_normally(tmp_path):
    """From the first batch on no file can grow beyond 20 bytes, so that none of the run's files can
    be written."""
    done = run("-c", NO_ROOM, str(tmp_path))
    assert done.code == 0, done.err
    assert "went on: 4 steps" in done.out
    lost = (
        "gating.npz",
        "gating.png",
        "similarity.npz",
        "similarity.png",
        "summary.json",
        "state.json",
    )
    for name in lost:
        assert done.err.count(f"{name} is not written: File too large") == 1, done.err
    assert (
        done.err.count("metrics.csv cannot be written, its rows stay in memory: File too large")
        == 1
    )
    (run_dir,) = tmp_path.glob("scmoe/*")
    assert not list((run_dir / "analysis").iterdir()), "no partial file is left"
    assert json.loads((run_dir / "state.json").read_text())["state"] == "running", (
        "the earlier file is whole"
    )


NO_ROOM = """
import resource, sys
from lightning.pytorch import Callback
from scmoe.config.load import load_config
from scmoe.lightning.seam.saves import LastCheckpoint
from scmoe.training.run import train
class NoRoom(Callback):
    def on_train_start(self, trainer, module):
        _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit))
made = train.build_callbacks
def build_callbacks(*arguments):
    callbacks = made(*arguments)
    for callback in callbacks:
        if isinstance(callback, LastCheckpoint):
            callback.save_top_k = 0  # a checkpoint that cannot be written is an error (fault 4)
    return [*callbacks, NoRoom()]
train.build_callbacks = build_callbacks
config = load_config(None, [
    "model.layers=4", "model.dim=16", "model.heads=2", "moe.num_experts=4",
    "moe.architecture=dgmoe", "data.name=synthetic", "data.vocab_size=64", "data.seq_len=8",
    "data.global_batch_size=4", "trainer.accelerator=cpu", "trainer.progress=false",
    "trainer.threads=1", "trainer.log_every=1", "trainer.val_every=100",
    "trainer.checkpoint_every=100", "logger.mode=disabled", "trainer.max_steps=4",
    "analysis.gating_every=1", "analysis.similarity_every=2", "runs_dir=" + sys.argv[1],
])
print(f"went on: {train.train(config)['steps']} steps")
"""


def test_a_resumed_run_without_matplotlib_ends_well(monkeypatch, tmp_path):
    """It finds the heat map that an earlier part of the run has drawn."""
    pytest.importorskip("tensorboard")
    picture = tmp_path / "expert_load.png"
    picture.write_bytes(b"")
    for name in ("matplotlib", "matplotlib.image"):
        monkeypatch.setitem(sys.modules, name, None)
    logger = loggers.SafeTensorBoardLogger(tmp_path, name="tensorboard", version="")
    logger.log_results(4, [], picture)
    assert not logger.lost
