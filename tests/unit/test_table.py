"""The harness of tables: what is skipped, marked, gone on with; and that rows are told apart by their model alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import harness
from experiments.table_config import Row, Scale, load_table
from experiments.table_launch import write_launch_files
from experiments.table_runs import Run, State, keep, plan, same_config, state_of
from scmoe.config.fields import Config, ConfigError
from scmoe.config.load import load, to_yaml
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.build.model import build_model, build_model_on_meta

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/experiment"
EXPERIMENTS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*/table.yaml")])
TABLES = sorted(path.parent.name for path in CONFIGS.glob("*/table.yaml"))

# A training that only leaves behind what a real one does. What it is to do stands in a file `orders/<name>`.
FAKE = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
args = sys.argv[1:]
if args[0] == "--resume":
    run_dir, name = pathlib.Path(args[1]), pathlib.Path(args[1]).parent.name
else:
    words = dict(word.split("=", 1) for word in args[1:])
    name = words["name"]
    run_dir = pathlib.Path(words["runs_dir"], name, "stamp-" + str(time.time_ns()))
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text((folder / "configs" / name).read_text())
with open(folder / "calls", "a") as calls:
    print(name, args[0] if args[0] == "--resume" else "new", file=calls)
order = folder / "orders" / name
do = order.read_text() if order.exists() else ""
if do:
    order.unlink()
if do == "fail":
    print("Traceback of many lines")
    sys.exit("RuntimeError: out of memory")
if do == "wait":
    def stop(*_):
        (run_dir / "checkpoints" / "step=3.ckpt").mkdir(parents=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("step 3/10  train/loss 1", flush=True)
    time.sleep(60)
(run_dir / "summary.json").write_text(json.dumps({"val_loss": 3.0 + len(name) / 100}))
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Two rows and two seeds of configs/debug.yaml, made by the fake training."""

    class Case:
        rows = (
            Row("top-2", ("a",), 3.2, ("moe.architecture=top_k", "moe.top_k=2")),
            Row("ScMoE", ("a", "b"), 3.1, ()),
        )
        calls = tmp_path / "calls"
        said: list[str]

        def plan(self, *overrides: str) -> list[Run]:
            scale = Scale("smoke", ROOT / "configs/debug.yaml", 2, 2)
            runs = plan(replace(load_table("table3", CONFIGS), rows=self.rows), scale, tmp_path / "t", 2, overrides)
            (tmp_path / "configs").mkdir(exist_ok=True)
            for run in runs:
                (tmp_path / "configs" / run.name).write_text(to_yaml(run.config))
            return runs

        def order(self, name: str, what: str) -> None:
            (tmp_path / "orders").mkdir(exist_ok=True)
            (tmp_path / "orders" / name).write_text(what)

        def make(self, runs: list[Run], jobs: int = 2) -> bool:
            self.said = []
            self.calls.write_text("")
            return harness.run_all(runs, jobs, "val_loss", self.said.append, lambda session: None)

        def called(self) -> list[str]:
            return sorted(self.calls.read_text().splitlines())

    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(harness, "TRAIN", (sys.executable, "-S", str(tmp_path / "fake.py")))
    return Case()


def statuses(runs: list[Run]) -> dict[str, str]:
    return {run.name: state_of(run).status for run in runs}


def test_finished_runs_are_skipped_and_a_failed_one_is_marked_and_tried_again(table):
    runs = table.plan()
    table.order("scmoe-seed1", "fail")
    assert table.make(runs)
    assert statuses(runs) == {
        "top-2-seed1": "finished",
        "scmoe-seed1": "failed",
        "top-2-seed2": "finished",
        "scmoe-seed2": "finished",
    }
    failed = state_of(runs[1])
    assert failed.error == "exit code 1: RuntimeError: out of memory"
    assert [line for line in table.said if "failed" in line and "out of memory" in line]
    assert table.make(table.plan())
    assert table.called() == ["scmoe-seed1 new"]
    assert set(statuses(runs).values()) == {"finished"}
    assert state_of(runs[1]).seconds >= failed.seconds > 0


def test_runs_of_another_config_are_made_anew(table):
    table.make(table.plan())
    changed = table.plan("optim.lr=0.5")
    assert set(statuses(changed).values()) == {"waiting"}
    table.make(changed)
    assert len(table.called()) == 4
    assert set(statuses(changed).values()) == {"finished"}
    assert set(statuses(table.plan()).values()) == {"waiting"}, "one state a run: the last"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_stopping_saves_every_run_and_the_next_call_goes_on(table, number):
    runs = table.plan()
    table.order("top-2-seed1", "wait")
    table.order("scmoe-seed1", "wait")

    def when_both_train() -> None:
        while not all(run.log.exists() and "step 3" in run.log.read_text() for run in runs[:2]):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=when_both_train)
    before = signal.getsignal(number)
    thread.start()
    assert not table.make(runs)
    thread.join()
    assert signal.getsignal(number) == before
    assert list(statuses(runs).values()) == ["cut", "cut", "waiting", "waiting"]
    assert table.make(runs)
    assert table.called() == ["scmoe-seed1 --resume", "scmoe-seed2 new", "top-2-seed1 --resume", "top-2-seed2 new"]
    assert set(statuses(runs).values()) == {"finished"}


def test_a_harness_that_was_killed_left_cut_runs_behind(table):
    (run, *_) = table.plan()
    keep(run, State("running", seconds=5.0))
    assert state_of(run) == State("cut", seconds=5.0)


def test_a_run_that_ended_while_nobody_waited_is_finished(table):
    runs = table.plan()
    table.make(runs)
    keep(runs[0], State("running"))
    table.make(runs)
    assert table.called() == []
    assert state_of(runs[0]).summary == {"val_loss": 3.0 + len(runs[0].name) / 100}


def test_two_harnesses_cannot_make_one_table(table, tmp_path):
    runs = table.plan()
    with harness.lock_of(runs[0].folder), pytest.raises(ConfigError, match="made already"):
        table.make(runs)


def test_a_run_that_ends_without_its_metric_has_failed(table):
    (run, *_) = table.plan()
    harness.run_all([run], 1, "no_such", lambda line: None, lambda session: None)
    assert state_of(run).error == "it ended without no_such in its summary"


def test_time_left_is_that_of_the_runs_beside_each_other():
    session = harness.Session([], 2, worked_s=100.0, progress=0.5, left={"a": 0.5, "b": 1.0})
    assert session.seconds_left() == pytest.approx(1.5 * 200 / 2)
    assert harness.Session([], 2).seconds_left() is None
    assert [harness.clock(s) for s in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]


def test_a_field_that_is_newer_than_the_run_counts_unless_it_is_at_its_default(tmp_path):
    config = load(ROOT / "configs/debug.yaml")
    stored = tmp_path / "config.yaml"
    stored.write_text("".join(line for line in to_yaml(config).splitlines(True) if "z_loss_coef" not in line))
    assert same_config(stored, config)
    assert not same_config(stored, load(ROOT / "configs/debug.yaml", ["moe.z_loss_coef=0.1"]))


# ---------------------------------------------------------------------- the tables there are


@pytest.mark.parametrize("name", TABLES)
def test_every_row_builds_at_every_scale(name, tmp_path):
    table = load_table(name, CONFIGS)
    assert {"smoke", "small", "paper"} <= table.scales.keys()
    for scale in table.scales.values():
        runs = plan(table, scale, tmp_path, scale.seeds)
        assert len({run.name for run in runs}) == len(table.rows) * scale.seeds
        for run in runs[: len(table.rows)]:
            build_model_on_meta(run.config)


def test_table3_is_the_papers():
    table = load_table("table3", CONFIGS)
    assert [row.paper for row in table.rows] == [
        *(3.270405, 3.240592, 3.236811, 3.224763, 3.232943, 3.237530, 3.241349, 3.225626)
    ]
    small = load(table.scales["small"].config)
    assert table.scales["small"].seeds >= 3
    assert small.trainer.max_steps * small.data.global_batch_size * small.data.seq_len >= 2e6
    assert (small.moe.capacity_factor, small.moe.load_balance_coef) == (2.0, 0.01)


def test_rows_begin_with_the_same_weights(tmp_path):
    """Where names and shapes agree, values do; only what a row has for itself is not in the first."""
    table = load_table("table3", CONFIGS)
    runs = plan(table, table.scales["smoke"], tmp_path, 2)
    weights = {run.name: build_model(run.config, ParallelContext()).state_dict() for run in runs}
    first, *others = (weights[run.name] for run in runs[: len(table.rows)])
    for other in others:
        assert first.keys() <= other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
        assert {name.split(".")[2] for name in other.keys() - first.keys()} <= {
            *("shared_expert", "coefficient", "tap_norm")
        }
    name = "blocks.0.moe.router.gate.weight"
    assert not torch.equal(first[name], weights[runs[len(table.rows)].name][name]), "another seed"
    assert len({run.config.data for run in runs}) == 1


def test_a_row_that_would_see_another_training_is_refused(table):
    table.rows = (*table.rows, Row("longer", ("a",), 3.0, ("data.seq_len=32",)))
    with pytest.raises(ConfigError, match=r"row 'longer' sets data.seq_len"):
        table.plan()


def test_an_unknown_table_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"table is 'table33', allowed: .*table3"):
        load_table("table33", CONFIGS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("baseline: top-2", "baseline: top-3"), "baseline is 'top-3', allowed: 'top-2'"),
        (("paper: 3.270405", "paper: best"), "paper is 'best', allowed: float"),
        (("seeds: 2", "seeds: 0"), "0 seeds"),
        (("    paper: 3.240592\n", ""), "allowed: name, groups, paper, overrides"),
        (("name: ScMoE Pos-1, CG-1", "name: ScMoE Pos 2 CG 1"), "same name"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, change, says):
    text = (CONFIGS / "table3/table.yaml").read_text()
    assert change[0] in text
    (tmp_path / "table3").mkdir()
    (tmp_path / "table3/table.yaml").write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError, match=says):
        load_table("table3", tmp_path)


def test_launch_files_hold_every_run(tmp_path):
    table = load_table("table3", CONFIGS)
    runs = plan(table, table.scales["paper"], tmp_path, 1)
    for command in write_launch_files(runs, tmp_path):
        path = Path(command.removeprefix("bash "))
        subprocess.run(["bash", "-n", path], check=True)
        assert started(path, tmp_path) == [run.config for run in runs]


def started(script: Path, folder: Path) -> list[Config]:
    """The configs of what a launch file starts; stand-ins for torchrun and sbatch note how they are called."""
    calls = folder / "launched"
    calls.write_text("")
    for name in (".venv/bin/torchrun", "sbatch"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "$CONFIG $*" >> {calls}\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", script.absolute()], cwd=folder, env=environment, check=True)
    configs = []
    for call in calls.read_text().splitlines():
        (config,) = (word for word in call.split() if word.endswith(".yaml"))
        configs.append(load(config, [word for word in call.split() if "=" in word and not word.startswith("--")]))
    return configs


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_an_experiment_opens_with_the_papers_values_its_command_and_its_cost(path):
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head is not None
    told = re.findall(r"^#   (paper|command|cost)  +\S", head[0], re.MULTILINE)
    assert told == ["paper", "command", "cost"]
    assert re.search(r"\d\.\d|\d{2}\.\d", head[0])
