"""A table's means and paired differences are right, and its files show where runs are missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scmoe.studies.job import State
from scmoe.studies.table.report import markdown, results, write_report
from scmoe.studies.table.rows import load_table
from scmoe.studies.table.runs import plan_runs
from scmoe.studies.table.statistics import compare, describe

CONFIGS = Path(__file__).parents[2] / "configs/experiment"


def test_mean_and_sample_deviation():
    assert describe({1: 1.0, 2: 2.0, 3: 6.0}) == {"mean": 3.0, "std": pytest.approx(math.sqrt(7)), "n": 3}
    assert describe({1: 1.5}) == {"mean": 1.5, "std": None, "n": 1}
    assert describe({}) == {"mean": None, "std": None, "n": 0}


def test_a_difference_is_taken_seed_by_seed():
    """The differences are 1, 2, 3; so t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, p = 0.0742, and the
    interval is 2 -+ 4.3027 / sqrt 3."""
    found = compare({1: 11.0, 2: 22.0, 3: 33.0, 4: 99.0}, {3: 30.0, 2: 20.0, 1: 10.0})
    assert (found["mean"], found["std"], found["n"]) == (2.0, 1.0, 3)
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert found["interval_95"] == pytest.approx([2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)], abs=1e-4)


def test_noise_that_rows_share_does_not_hide_a_difference():
    """Seeds differ by 1, rows by 0.01: the paired test detects the difference."""
    baseline = {seed: float(seed) for seed in range(5)}
    values = {seed: seed - 0.01 - 0.001 * (seed % 2) for seed in range(5)}
    assert compare(values, baseline)["p"] < 1e-4


@pytest.mark.parametrize("values", ({1: 2.0}, {1: 2.0, 2: 3.0}, {}), ids=("one pair", "all the same", "none"))
def test_there_is_no_p_value_where_no_test_is_possible(values):
    found = compare(values, {1: 1.0, 2: 2.0})
    assert (found["p"], found["interval_95"], found["n"]) == (None, None, len(values))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    table = load_table("table3", CONFIGS)
    return table, plan_runs(table, table.scales["smoke"], tmp_path_factory.mktemp("runs") / "table3-smoke", 3)


@pytest.fixture
def made(planned, tmp_path):
    """Table 3 with 3 seeds; the loss of row i is 5 + i / 100 + a part of the seed. One run failed, one is cut."""
    table, runs = planned
    for i, run in enumerate(runs):
        run_dir = tmp_path / f"20261125-{i:06}-made"
        run_dir.mkdir()
        environment = {"cpus": 2, "platform": "Linux-6", "git_commit": "abc", "packages": {"torch": "2.13"}}
        (run_dir / "env.json").write_text(json.dumps(environment))
        row, seed = i % len(table.rows), run.seed
        loss = 5 + row / 100 + seed / 10 + (row * seed % 3) / 1000
        summary = {"val_loss": loss, "params_total": 2e6, "params_active": 1e6}
        run.job.state = State("finished", str(run_dir), 10.0, results=summary)
    by_name = {run.job.name: run for run in runs}
    by_name["scmoe-pos-2-cg-1-seed2"].job.state = State("failed", error="exit code 1: no memory")
    by_name["scmoe-pos-3-cg-1-seed3"].job.state = State("cut", seconds=3.0)
    runs[0].job.study.mkdir(exist_ok=True)
    return table, runs


def test_results(made):
    table, runs = made
    found = results(table, "smoke", runs)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [row.name for row in table.rows]
    top2, shared, cg1 = (rows[name] for name in ("top-2", "shared-expert, CG-2", "ScMoE Pos-2, CG-1"))
    assert top2["difference"] is None
    assert top2["paper"] == {"val_loss": 3.270405, "difference": 0.0}
    assert shared["paper"]["difference"] == pytest.approx(3.240592 - 3.270405)
    assert shared["ours"]["n"] == shared["difference"]["n"] == 3
    assert shared["difference"]["mean"] == pytest.approx(0.01 + 0.001, abs=1e-9)
    assert (cg1["ours"]["n"], cg1["difference"]["n"], cg1["failed"]) == (2, 2, {2: "exit code 1: no memory"})
    assert rows["ScMoE Pos-3, CG-1"]["unfinished"] == [3]
    assert found["tokens_per_run"] == 4 * 8 * 16
    assert found["runs"] == {"finished": 22, "failed": 1}


def test_files(made):
    table, runs = made
    paths = write_report(table, "smoke", runs)
    assert [path.name for path in paths] == ["table.md", "results.json", "chart.png"]
    text, found = paths[0].read_text(), json.loads(paths[1].read_text())
    assert text.count("| ScMoE Pos-2, CG-1 |") == 2, "the row is in both of its groups"
    assert text.count("| top-2 |") == 1
    assert "Incomplete: ScMoE Pos-2, CG-1: 1 failed, 0 to run; ScMoE Pos-3, CG-1: 0 failed, 1 to run." in text
    assert "Spearman" in text
    assert found["rows"][0]["ours"]["n"] == 3
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_row_without_a_run_is_empty(made):
    table, runs = made
    for run in runs:
        if run.row is table.rows[1] or run.seed > 1:
            run.job.state = State()
    text = markdown(results(table, "smoke", runs))
    assert "| shared-expert, CG-2 |  | 3.2406 | -0.0298 | (0) |  |  | (0) |" in text
    assert "| ScMoE Pos-2, Direct Add | 2.00M (1.00M) | 3.2368 | -0.0336 | 5.1220 (1) | +0.0220 |  | (1) |" in text
    assert "Spearman" not in text
    write_report(table, "smoke", runs)
