"""A sweep of real trainings here, one of which fails; the searching and cutting is in tests/unit/test_sweep_*.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from scmoe.config.load import load
from scmoe.studies.runs import find_runs, open_run
from tests.support.commands import run

pytestmark = [pytest.mark.smoke, pytest.mark.dist, pytest.mark.timeout(600)]

SWEEP = """\
program: experiments/train.py
command: ["${env}", "${interpreter}", -m, experiments.train, configs/debug.yaml, "${args_no_hyphens}"]
method: grid
parameters:
  optim.lr: {values: [1.0e+30, 1.0e-2]} # at the first the loss is no number any more
"""


def test_a_sweep_of_trainings(tmp_path):
    (tmp_path / "two.yaml").write_text(SWEEP)
    done = run("-m", "experiments.sweep", str(tmp_path / "two.yaml"), "--local", f"runs_dir={tmp_path}")
    best = done.summary["best"]
    assert {**done.summary, "best": None} == {"trials": 2, "finished": 1, "failed": 1, "best": None}
    trained = json.loads(Path(best["run_dir"], "summary.json").read_text())
    assert best["val/loss"] == pytest.approx(trained["val_loss"])
    assert load(best["config"]).optim.lr == 1e-2
    with (tmp_path / "sweeps" / "two" / "results.csv").open(newline="") as file:
        failed, finished = csv.DictReader(file)
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert failed["reason"].startswith("exit code 1: FloatingPointError: ")
    assert open_run(best["run_dir"]).curve("val/loss")[-1] == (4 * 4 * 16, pytest.approx(trained["val_loss"]))
    assert [(run.state, run.steps) for run in find_runs(tmp_path)] == [("finished", 4), ("failed", 1)]
    assert "\ntrial 2 of 2 finished" in done.err
