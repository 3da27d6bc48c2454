"""A local sweep marks failed trials, resumes cut ones, skips finished ones, and leaves no process behind.

The trials are toy trainings, which start quickly; tests/smoke/test_sweep.py has real ones.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scmoe.config.extras import scmoe
from scmoe.experiments.engine.command_line import call
from tests.support.commands import Done

ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = {
    "program": "experiments/train.py",
    "command": [
        *("${interpreter}", "-m", "tests.support.toy_training", "0@0", "experiments.train"),
        *("configs/debug.yaml", "trainer.max_steps=6", "${args_no_hyphens}"),
    ],
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {"optim.lr": {"values": [1e-1, 1e-2, 1.0, 1e-3]}},
}


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts the sweep of a file with these changes, and returns its process."""

    def start(name: str = "s", pause: str = "0@0", **changes: Any) -> subprocess.Popen[str]:
        config = {**SWEEP, **changes}
        config["command"] = [pause if word == "0@0" else word for word in config["command"]]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        words = [str(tmp_path / f"{name}.yaml"), "--local", f"runs_dir={tmp_path}"]
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "experiments.sweep", *words]
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    return start


def end(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate()
    return Done(process.returncode, out, err)


def rows(tmp_path: Path, name: str = "s") -> list[dict[str, str]]:
    with (tmp_path / "sweeps" / name / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def until(there: Any) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def alive(folder: Path) -> list[str]:
    """Returns the processes that have this folder in their command line."""
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
    return [pid for pid in found if int(pid) != os.getpid()]


def test_a_failed_trial_is_marked_and_the_best_is_named(start, tmp_path):
    done = end(start(project="mine"))
    best = done.summary.pop("best")
    assert done.summary | {"best": None} == {"trials": 4, "finished": 3, "failed": 1, "best": None}
    assert (best["trial"], best["val/loss"]) == (2, pytest.approx(1 / 6))
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "finished", "failed", "finished"]
    assert rows(tmp_path)[2]["reason"] == "exit code 1: FloatingPointError: [no] number"
    lines = [line for line in done.err.splitlines() if line.startswith("trial ")]
    assert [line.split(":")[0] for line in lines] == [
        f"trial {i} of 4 {row['state']}" for i, row in enumerate(rows(tmp_path), 1)
    ]
    assert all("left" in line for line in lines[:-1]), "each line but the last shows the time that is left"
    again = end(start(project="mine"))
    assert again.out == done.out
    assert again.err.splitlines()[0] == "4 trials have ended already"
    configs = sorted((tmp_path / "sweeps/s").glob("trial-*/*/config.yaml"))
    assert len(configs) == 4, "nothing was run twice"
    config = yaml.safe_load(configs[0].read_text())
    assert (config["logger"]["group"], config["logger"]["project"], config["optim"]["lr"]) == ("s", "mine", 0.1)
    config = yaml.safe_load((tmp_path / "sweeps/s/best.yaml").read_text())
    assert (config["optim"]["lr"], config["name"]) == (0.01, "debug")
    assert "optim.lr" in (tmp_path / "sweeps/s/summary.md").read_text()


def test_a_trial_that_ends_with_nan_has_failed(start, tmp_path):
    done = end(start(parameters={"optim.lr": {"values": [0.5, 1e-3]}}))
    assert [row["state"] for row in rows(tmp_path)] == ["failed", "finished"]
    assert rows(tmp_path)[0]["reason"] == "its last val/loss is nan"
    assert done.summary["best"]["trial"] == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_cut_sweep_is_resumed(signum, start, tmp_path):
    process = start(pause="0.5@0.01")
    first, second = (tmp_path / "sweeps/s" / name for name in ("trial-001", "trial-002"))
    until(lambda: any(second.glob("*/metrics.csv")))
    os.killpg(process.pid, signum)  # a terminal signals the whole group
    done = end(process)
    assert done.code == 128 + signum, done.err
    assert not alive(tmp_path)
    again = scmoe("sweep", tmp_path / "s.yaml", "--local", f"runs_dir={tmp_path}")
    assert f"go on        {again}" in done.err.splitlines()
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "cut"]
    before = list(first.glob("*/config.yaml")) + list(second.glob("*/config.yaml"))
    assert any(second.glob("*/checkpoints/*.ckpt"))
    again = end(start(pause="0.5@0.01"))
    assert again.summary["finished"] == 3, "three trials finished, one failed"
    assert before == list(first.glob("*/config.yaml")) + list(second.glob("*/config.yaml")), "in the same directories"
    assert [row["steps"] for row in rows(tmp_path)] == ["6", "6", "0", "6"]


def test_a_killed_sweep_keeps_its_state_and_holds_its_lock_while_its_trial_runs(start, tmp_path):
    process = start(pause="0.3@0.1")
    until(lambda: any((tmp_path / "sweeps/s/trial-001").glob("*/metrics.csv")))
    process.kill()
    process.wait()
    (left,) = map(int, alive(tmp_path))
    os.kill(left, signal.SIGSTOP)  # so that it holds the lock while the next sweep starts
    try:
        refused = end(start(pause="0.3@0.1"))
    finally:
        os.kill(left, signal.SIGCONT)
    assert refused.code == 2
    assert "another process is running this study" in refused.err
    until(lambda: not alive(tmp_path))
    assert end(start(pause="0.3@0.1")).summary["finished"] == 3


def test_hyperband_stops_trials_early(start, tmp_path):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 4}
    space = {"optim.lr": {"values": [1e-2, 1e-5]}}
    done = end(start(pause="0.5@1e-5", early_terminate=rule, parameters=space))
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "stopped"]
    assert int(rows(tmp_path)[1]["steps"]) < 6
    assert (done.summary["finished"], done.summary["best"]["trial"]) == (2, 1)


def test_a_changed_file_is_refused_and_a_higher_run_cap_is_not(start, tmp_path):
    assert end(start(run_cap=1)).code == 0
    changed = end(start(run_cap=1, parameters={"optim.lr": {"value": 0.5}}))
    assert changed.code == 2
    assert "parameters is not as it was" in changed.err
    assert end(start(run_cap=2)).summary["trials"] == 2


def test_a_changed_config_is_refused_and_the_best_one_stays(start, tmp_path):
    base, command = tmp_path / "base.yaml", list(SWEEP["command"])
    base.write_text(f"extends: {ROOT}/configs/debug.yaml\n")
    command[command.index("configs/debug.yaml")] = str(base)
    assert end(start(run_cap=1, command=command)).code == 0
    best = (tmp_path / "sweeps/s/best.yaml").read_bytes()
    base.write_text(f"extends: {ROOT}/configs/debug.yaml\nseed: 5\n")
    changed = end(start(run_cap=1, command=command))
    assert changed.code == 2 and f"{base} is not as it was" in changed.err
    assert (tmp_path / "sweeps/s/best.yaml").read_bytes() == best


def test_a_metric_that_is_never_logged_ends_the_sweep_with_its_name(start):
    done = end(start(metric={"name": "val/los"}))
    assert done.code == 2
    assert "metric.name is 'val/los', which trial 1 has not logged, allowed: val/loss" in done.err


def test_a_sweep_with_only_failed_trials_is_an_error(start):
    done = end(start(parameters={"optim.lr": {"values": [1, 1.0]}}))
    assert done.code == 1
    assert json.loads(done.out) == {"trials": 2, "finished": 0, "failed": 2, "best": None}


def test_a_wrong_request_is_answered_in_one_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in (["configs/sweep/smoke.yaml", "--locla"], ["configs/sweep/nothing.yaml"], ["configs/debug.yaml"]):
        assert call("sweep", *words) == 2
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 1, words
