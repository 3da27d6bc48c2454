"""A sweep at W&B, here a server on 127.0.0.1: the agent's trials, how they are stopped, and a
server that is gone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scmoe.config.leaves import ConfigError
from scmoe.sweeps.sweep_file import read
from scmoe.sweeps.trials import run_online
from tests.support.commands import ROOT, environment
from tests.support.wandb_server import wandb_server

pytestmark = [pytest.mark.smoke, pytest.mark.ranks, pytest.mark.timeout(600)]


@pytest.mark.faults
def test_a_sweep_through_an_agent(tmp_path):
    """The first of two trials is refused before it opens a run, which does not end the sweep. The
    run of the other one has the id of the agent."""
    ours = yaml.safe_load((ROOT / "configs/sweep/smoke.yaml").read_text())
    ours["parameters"]["optim.lr"]["values"] = [1e-3]
    ours["parameters"]["init_from"]["values"].reverse()
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(ours))
    with wandb_server() as server:
        words = (str(tmp_path / "two.yaml"), f"runs_dir={tmp_path}")
        command, env = (
            [sys.executable, "-m", "scmoe", "sweep", *words],
            environment(**server.variables),
        )
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"sweep": "me/scmoe/sweep001", "exit_code": 0}
    made, joined = (
        line.split()
        for line in done.stderr.splitlines()
        if line.startswith(("    wandb ", "    PATH="))
    )
    assert joined == ["PATH=$PWD/.venv/bin:$PATH", "wandb", "agent", "me/scmoe/sweep001"]
    assert made[:-1] == ["wandb", "sweep", "--entity", "me", "--project", "scmoe"]
    assert yaml.safe_load(Path(made[-1]).read_text()) == server.sweep
    sent = server.sweep
    assert sent.pop("command")[-2:] == [*words[1:], "${args_no_hyphens}"]
    assert sent == {key: value for key, value in ours.items() if key != "command"}, (
        "only the command differs"
    )
    assert server.run.name == "trial1", "the agent gives the ids"
    assert (server.run.config["init_from"], server.run.exit_code, server.run.sweep) == (
        None,
        0,
        "sweep001",
    )
    assert len(server.run.column("train/loss")) == 4 and server.run.column("val/loss")
    assert [artifact.run for artifact in server.artifacts if artifact.type == "model"] == ["trial1"]
    ids = {json.loads(path.read_text())["id"] for path in tmp_path.glob("debug/*/wandb_run.json")}
    assert ids == {"trial1"}, "a resumed trial must be the same run"


def left_behind(folder: Path) -> list[str]:
    """Return the processes whose environment has this folder; W&B's own are among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended or is another user's
            found += [path.parent.name] * (str(folder).encode() in path.read_bytes())
    return found


def trials_with_rows(folder: Path) -> set[str]:
    """Return the W&B ids of the runs in this folder that have logged something."""
    records = [
        path
        for path in folder.glob("debug/*/wandb_run.json")
        if path.with_name("metrics.csv").exists()
    ]
    return {json.loads(path.read_text())["id"] for path in records}


@pytest.mark.faults
def test_a_trial_that_w_and_b_stops_and_one_that_is_interrupted_are_saved(tmp_path):
    """The server stops the first trial, as its Hyperband does; Ctrl-C interrupts the second."""
    long = (
        "trainer.max_steps=100000",
        "trainer.val_every=100000",
        "trainer.checkpoint_every=100000",
    )
    words = ("configs/sweep/smoke.yaml", f"runs_dir={tmp_path}", *long)

    def until_it_trains(trial: str) -> None:
        """Wait for rows in metrics.csv: the client sends its rows only every 15 s."""
        while trial not in trials_with_rows(tmp_path):
            assert process.poll() is None
            time.sleep(0.1)

    with wandb_server() as server, (tmp_path / "said").open("w") as said:
        command, env = (
            [sys.executable, "-m", "scmoe", "sweep", *words],
            environment(**server.variables),
        )
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True
        )
        until_it_trains("trial0")
        server.stopped.add("trial0")
        until_it_trains("trial1")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        code = process.wait(120)
    assert code == 130
    assert not left_behind(tmp_path)
    assert {name: run.exit_code for name, run in server.runs.items()} == {"trial0": 1, "trial1": 1}
    assert len(list(tmp_path.glob("debug/*/checkpoints/step=*.ckpt"))) == 2
    assert (
        "go on        PATH=$PWD/.venv/bin:$PATH wandb agent me/scmoe/sweep001"
        in (tmp_path / "said").read_text()
    )


def test_a_server_that_does_not_answer_a_sweep_is_an_error(monkeypatch):
    import wandb

    wandb.teardown()
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    with wandb_server() as server:
        server.close()
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        with pytest.raises(ConfigError, match=r"^Weights & Biases takes no sweep: "):
            run_online(read("configs/sweep/smoke.yaml"))
        with pytest.raises(
            ConfigError, match=r"^logger\.mode is 'disabled', so W&B would see no trial"
        ):
            run_online(read("configs/sweep/smoke.yaml", ["logger.mode=disabled"]))
    wandb.teardown()


def test_the_variable_that_keeps_a_sweep_from_wandb_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"^WANDB_MODE is 'offline', so W&B would see no trial"):
        run_online(read("configs/sweep/smoke.yaml"))
