"""A local sweep marks failed trials, resumes cut ones, skips finished ones, and leaves no process
behind.

The trials are toy trainings, which start quickly; the README's command has real ones.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from scmoe.command_line import call
from scmoe.config.installation import scmoe
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.parallel.checkpoint.durable import process_start
from scmoe.sweeps import trials
from scmoe.sweeps.batch import BatchProgress, JobBatch
from scmoe.sweeps.jobs import State, hold_lock
from scmoe.sweeps.sweep_file import read
from tests.support.commands import ROOT, Done
from tests.support.toy_sweep import toy_job

SWEEP: dict[str, Any] = {
    "program": "scmoe/__main__.py",
    "command": [
        *("scmoe", "train", "configs/debug.yaml", "trainer.max_steps=6", "${args_no_hyphens}")
    ],
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {"optim.lr": {"values": [1e-1, 1e-2, 1e-3]}},
}


def words_of(folder: Path, **changes: Any) -> list[str]:
    """Write the sweep s.yaml with these changes, and return the command that runs it."""
    (folder / "s.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    return ["sweep", str(folder / "s.yaml"), "--local", f"runs_dir={folder}"]


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys) -> Callable[..., Done]:
    """Return a function that runs the sweep in this process."""

    def sweep(pause: str = "0@0", **changes: Any) -> Done:
        monkeypatch.setattr(trials, "StudyJob", toy_job(pause))
        code = call(*words_of(tmp_path, **changes))
        return Done(code, *capsys.readouterr())

    monkeypatch.chdir(ROOT)
    return sweep


def start(folder: Path, pause: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.toy_sweep", pause, *words_of(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweeps/s/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def alive(folder: Path) -> list[str]:
    """Return the processes that have this folder in their command line."""
    found = subprocess.run(
        ["pgrep", "-f", str(folder)], capture_output=True, text=True
    ).stdout.split()
    return [pid for pid in found if int(pid) != os.getpid()]


def test_failed_trials_are_marked_and_the_best_is_named(sweep, tmp_path):
    """The third trial raises, and the fourth one ends with NaN."""
    changes = {"project": "mine", "parameters": {"optim.lr": {"values": [1e-1, 1e-2, 1.0, 0.5]}}}
    done = sweep(**changes)
    best = done.summary.pop("best")
    assert done.summary | {"best": None} == {"trials": 4, "finished": 2, "failed": 2, "best": None}
    assert (best["trial"], best["val/loss"]) == (2, pytest.approx(1 / 6))
    states, reasons = zip(*((row["state"], row["reason"]) for row in rows(tmp_path)), strict=True)
    assert states == ("finished", "finished", "failed", "failed")
    assert reasons[2:] == (
        "exit code 1: FloatingPointError: [no] number",
        "its last val/loss is nan",
    )
    lines = [line for line in done.err.splitlines() if line.startswith("trial ")]
    assert [line.split(":")[0] for line in lines] == [
        f"trial {i} of 4 {s}" for i, s in enumerate(states, 1)
    ]
    assert all("left" in line for line in lines[:-1]), (
        "each line but the last shows the time that is left"
    )
    again = sweep(**changes)
    assert again.out == done.out
    assert again.err.splitlines()[0] == "4 trials have ended already"
    configs = sorted((tmp_path / "sweeps/s").glob("trial-*/*/config.yaml"))
    assert len(configs) == 4, "nothing was run twice"
    config = yaml.safe_load(configs[0].read_text())
    assert (config["logger"]["group"], config["logger"]["project"], config["optim"]["lr"]) == (
        "s",
        "mine",
        0.1,
    )
    config = yaml.safe_load((tmp_path / "sweeps/s/best.yaml").read_text())
    assert (config["optim"]["lr"], config["name"]) == (0.01, "debug")
    assert "optim.lr" in (tmp_path / "sweeps/s/summary.md").read_text()


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.faults),
        pytest.param(signal.SIGHUP, marks=pytest.mark.faults),
    ],
)
def test_a_cut_sweep_is_resumed(signum, sweep, tmp_path):
    process = start(tmp_path, "0.3@0.01")
    first, second = (tmp_path / "sweeps/s" / name for name in ("trial-001", "trial-002"))
    until(lambda: any(second.glob("*/metrics.csv")))
    os.killpg(process.pid, signum)  # a terminal signals the whole group
    _, err = process.communicate()
    assert process.returncode == 128 + signum, err
    assert not alive(tmp_path)
    again = scmoe("sweep", tmp_path / "s.yaml", "--local", f"runs_dir={tmp_path}")
    assert f"go on        {again}" in err.splitlines()
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "cut"]
    before = list(first.glob("*/config.yaml")) + list(second.glob("*/config.yaml"))
    assert any(second.glob("*/checkpoints/*.ckpt"))
    assert sweep(pause="0.3@0.01").summary["finished"] == 3
    assert before == list(first.glob("*/config.yaml")) + list(second.glob("*/config.yaml")), (
        "in the same directories"
    )
    assert [row["steps"] for row in rows(tmp_path)] == ["6"] * 3, "the one that was never begun too"


def test_a_killed_sweep_keeps_its_state_and_holds_its_lock_while_its_trial_runs(sweep, tmp_path):
    process = start(tmp_path, "0.3@0.1")
    until(lambda: any((tmp_path / "sweeps/s/trial-001").glob("*/metrics.csv")))
    process.kill()
    process.wait()
    (left,) = map(int, alive(tmp_path))
    os.kill(left, signal.SIGSTOP)  # so that it holds the lock while the next sweep starts
    try:
        refused = sweep(pause="0.3@0.1")
    finally:
        os.kill(left, signal.SIGCONT)
    assert refused.code == 2
    assert "another process is running this study" in refused.err
    # a process that ends loses its command line before its files, and so its lock
    until(lambda: process_start(left) is None)
    assert sweep(pause="0.3@0.1").summary["finished"] == 3


def test_a_changed_sweep_or_config_is_refused_and_a_higher_run_cap_is_not(sweep, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(f"extends: {ROOT}/configs/debug.yaml\n")
    command = [str(base) if word == "configs/debug.yaml" else word for word in SWEEP["command"]]
    assert sweep(run_cap=1, command=command).code == 0
    best = (tmp_path / "sweeps/s/best.yaml").read_bytes()
    changed = sweep(run_cap=1, command=command, parameters={"optim.lr": {"value": 0.5}})
    assert changed.code == 2 and "parameters is not as it was" in changed.err
    base.write_text(f"extends: {ROOT}/configs/debug.yaml\nseed: 5\n")
    changed = sweep(run_cap=1, command=command)
    assert changed.code == 2 and f"{base} is not as it was" in changed.err
    assert (tmp_path / "sweeps/s/best.yaml").read_bytes() == best
    base.write_text(f"extends: {ROOT}/configs/debug.yaml\n")
    assert sweep(run_cap=2, command=command).summary["trials"] == 2


def test_a_sweep_without_a_result_is_an_error(sweep):
    done = sweep(parameters={"optim.lr": {"value": 1.0}})
    assert done.code == 1
    assert json.loads(done.out) == {"trials": 1, "finished": 0, "failed": 1, "best": None}
    done = sweep(metric={"name": "val/los"}, name="misspelt")
    assert done.code == 2
    assert (
        "metric.name is 'val/los', which trial 1 has not logged. It has logged val/loss" in done.err
    )


def test_a_wrong_request_is_answered_in_one_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in (
        ["configs/sweep/smoke.yaml", "--locla"],
        ["configs/sweep/nothing.yaml"],
        ["configs/debug.yaml"],
    ):
        assert call("sweep", *words) == 2
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 1, words


def test_a_study_in_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), hold_lock(tmp_path / "file/a"):
        pass


def test_the_bar_of_a_sweep_without_an_end_shows_no_total():
    watch = BatchProgress(lambda job: "")
    for total, shown in ((None, "0.0"), (3, "0.0/3")):
        watch(JobBatch([], 1, total, watch), None)
        screen = Console(file=StringIO(), width=100)
        screen.print(watch.bar.get_renderable())
        words = screen.file.getvalue().split()
        assert shown in words
        assert not any("None" in word for word in words)


def test_a_trial_is_sent_to_the_sweep_s_project_and_entity_and_kept_in_its_folder(
    monkeypatch, tmp_path
):
    folder = tmp_path / "set #1: all"
    folder.mkdir()
    monkeypatch.chdir(ROOT)
    (folder / "s.yaml").write_text(yaml.safe_dump({**SWEEP, "project": "p", "entity": "team"}))
    sweep = read(str(folder / "s.yaml"), [f'runs_dir="{folder}"'])
    state = State(results={"number": 0, "parameters": {}})
    words = [word for word in trials._job(sweep, state).arguments if "=" in word]
    config = load_config("configs/debug.yaml", words)
    assert (config.logger.project, config.logger.entity) == ("p", "team")
    assert Path(config.runs_dir) == folder / "sweeps/s"
