"""Runs of Table 3 for several tests."""

import shutil

import pytest
from matplotlib.figure import Figure

from experiments.tables.table_file import load_table
from experiments.tables.table_runs import plan_runs
from scmoe.sweeps.jobs import State
from tests.support.tables import CONFIGS, state_of


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    table = load_table("table3", CONFIGS)
    return table, plan_runs(
        table, table.scales["smoke"], tmp_path_factory.mktemp("runs") / "table3-smoke", 3
    )


@pytest.fixture
def made(planned):
    """Return Table 3 with 3 seeds; the loss of row i is 5 + i / 100 + a part of the seed. One run
    failed, one is cut."""
    table, runs = planned
    for i, run in enumerate(runs):
        row, seed = i % len(table.rows), run.seed
        run.job.state = state_of(5 + row / 100 + seed / 10 + (row * seed % 3) / 1000, run.digest)
    by_name = {run.job.name: run for run in runs}
    by_name["scmoe-pos-2-cg-1-seed2"].job.state = State("failed", error="exit code 1: no memory")
    by_name["scmoe-pos-3-cg-1-seed3"].job.state = State("cut", seconds=3.0)
    runs[0].job.study.mkdir(exist_ok=True)
    shutil.rmtree(runs[0].job.study / "speed", ignore_errors=True)
    return table, runs


@pytest.fixture
def figures(monkeypatch):
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found
