"""This sweep runs two real trainings, and one fails. tests/unit/test_sweep_*.py test search and early stopping."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from scmoe.config.load import load
from scmoe.runs.seen import find_runs, open_run
from tests.support.commands import ROOT, run

pytestmark = [pytest.mark.smoke, pytest.mark.dist, pytest.mark.timeout(600)]


@pytest.mark.faults
def test_a_sweep_of_trainings(tmp_path):
    """The sweep is configs/sweep/smoke.yaml with one learning rate. The first of its two trials fails."""
    sweep = yaml.safe_load((ROOT / "configs/sweep/smoke.yaml").read_text())
    sweep["parameters"]["optim.lr"]["values"] = [1e-2]
    sweep["parameters"]["init_from"]["values"].reverse()
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(sweep))
    done = run("-m", "experiments.sweep", str(tmp_path / "two.yaml"), "--local", f"runs_dir={tmp_path}")
    best = done.summary["best"]
    assert {**done.summary, "best": None} == {"trials": 2, "finished": 1, "failed": 1, "best": None}
    trained = json.loads(Path(best["run_dir"], "summary.json").read_text())
    assert best["val/loss"] == pytest.approx(trained["val_loss"])
    assert load(best["config"]).optim.lr == 1e-2
    with (tmp_path / "sweeps" / "two" / "results.csv").open(newline="") as file:
        failed, finished = csv.DictReader(file)
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert failed["reason"].startswith("exit code 2: error: init_from is 'scmoe:no-such-file.safetensors'")
    assert open_run(best["run_dir"]).curve("val/loss")[-1] == (4 * 4 * 16, pytest.approx(trained["val_loss"]))
    assert [(run.state, run.steps) for run in find_runs(tmp_path)] == [("finished", 4)], "the other one opened no run"
    assert "\ntrial 2 of 2 finished" in done.err
