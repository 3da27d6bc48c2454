"""A table's results have differences and decisions, also at equal time."""

import json
from dataclasses import replace
from random import Random

import pytest

from experiments.tables.table_file import Decision
from experiments.tables.table_page import markdown
from scmoe.sweeps.jobs import State
from tests.support.tables import (
    POS1,
    POS2,
    POS3,
    planned_of,
    results_by_row,
    state_of,
    write_speeds,
)


def test_results(made):
    table, runs = made
    found, rows = results_by_row(table, runs)
    assert list(rows) == [row.name for row in table.rows]
    top2, shared, cg1 = (rows[name] for name in ("top-2", "shared-expert, CG-2", POS2))
    assert top2["minus_baseline"] is None
    assert top2["paper"] == {"val_loss": 3.270405, "difference": 0.0}
    assert shared["paper"]["difference"] == pytest.approx(3.240592 - 3.270405)
    assert shared["ours"]["n"] == shared["minus_baseline"]["n"] == 3
    assert shared["minus_baseline"]["mean"] == pytest.approx(0.01 + 0.001, abs=1e-9)
    assert (cg1["ours"]["n"], cg1["minus_baseline"]["n"], cg1["failed"]) == (
        2,
        2,
        {2: "exit code 1: no memory"},
    )
    assert rows[POS3]["unfinished"] == [3]
    assert found["tokens_per_run"] == 4 * 8 * 16
    assert found["runs"] == {"finished": 22, "failed": 1}


def test_a_difference_is_decided_by_its_corrected_p(made):
    table, runs = made
    for run in runs:
        ahead = 0.05 if run.row.name == POS2 else 0.002
        noise = Random(f"{run.row.name}{run.seed}").uniform(-0.003, 0.003)
        run.job.state = state_of(
            4.0 + run.seed - (0 if run.row.is_baseline else ahead) + noise, run.digest
        )
    found, rows = results_by_row(table, runs)
    minus = rows[POS2]["minus_baseline"]
    assert minus["decided"] and minus["p"] < 0.05 and minus["high"] < 0
    assert not rows[POS1]["minus_baseline"]["decided"]
    decided = f"val_loss: decided (corrected p < 0.05): {POS2} is below top-2.\n"
    assert decided in markdown(found)


def test_at_equal_time_the_fastest_row_is_at_its_end_and_slower_ones_are_earlier(made):
    """Pos-3 is fastest, at 1.6. When it ends, top-2 has made 4 / 1.6 = 2.5 of 4 steps: its loss is
    0.15 higher."""
    table, runs = made
    for run in runs:
        run.job.state = state_of(5.0 + run.seed / 10, run.digest)
    write_speeds(runs[0].job.study, 0.52)
    results_of_all, _ = results_by_row(table, runs)
    found = results_of_all["equal_time"]
    assert list(found) == ["equal_tokens", "0.52"], "0.15 has not been measured"
    assert found["0.52"]["two_batches"]
    at_time = found["0.52"]["rows"]
    assert at_time[POS3]["loss"]["mean"] == pytest.approx(5.2)
    assert at_time["top-2"]["loss"]["mean"] == pytest.approx(5.2 + 0.15)
    assert at_time[POS3]["minus_baseline"]["mean"] == pytest.approx(-0.15)
    assert found["equal_tokens"]["rows"][POS3]["minus_baseline"]["mean"] == pytest.approx(0)
    assert "ScMoE Pos-2 (L0 Pos-1), CG-1" not in at_time, "the testbed has no such row"
    assert "Speed-ups at a share of 0.52 (0.53 as measured)" in markdown(results_of_all)


def test_a_rival_with_two_batches_in_flight_is_compared_at_its_own_speed(made):
    """Pos-3 is fastest, at 1.6, and top-2 with two batches has 1.5: 3.75 of 4 steps."""
    table, runs = made
    for run in runs:
        run.job.state = state_of(5.0 + run.seed / 10, run.digest)
    study = runs[0].job.study
    write_speeds(study, 0.52)
    path = next((study / "speed").glob("*.json"))
    report = json.loads(path.read_text())
    report["rows"]["top2_two"]["train_speedup"] = 1.5
    path.write_text(json.dumps(report))
    found, _ = results_by_row(table, runs)
    at_time = found["equal_time"]["0.52"]["rows"]
    assert at_time["top-2"]["speed"] == 1.5
    assert at_time["top-2"]["loss"]["mean"] == pytest.approx(5.2 + 0.025)
    assert "two batches in flight" in markdown(found)


def test_the_interval_at_equal_time_holds_the_quartiles_of_both_speeds(made):
    """A curve falls by 0.1 a step. Where Pos-3 at its upper quartile has made all of its 4 steps,
    top-2 has made 1.1 parts of 1.9, and the reverse."""
    table, runs = made
    for run in runs:
        own = run.seed / 10 if run.row.name == POS3 else 0.0
        run.job.state = state_of(5.0 + own, run.digest)
    write_speeds(runs[0].job.study, 0.52)
    found, _ = results_by_row(table, runs)
    minus = found["equal_time"]["0.52"]["rows"][POS3]["minus_baseline"]
    low, high = minus["with_speeds"]
    slowest = (4 - 4 * 1.1 / 1.9) * 0.1  # loss that the slower one has left
    half_width = (minus["high"] - minus["low"]) / 2
    at_equal_tokens = found["equal_time"]["equal_tokens"]["rows"][POS3]["minus_baseline"]["mean"]
    assert low == pytest.approx(at_equal_tokens - slowest - half_width)
    assert high == pytest.approx(at_equal_tokens + slowest + half_width)
    assert f"{low:+.4f} to {high:+.4f}" in markdown(found)


def test_sizes_are_compared_with_their_own_baseline(tmp_path):
    table, runs = planned_of("table6", tmp_path, 2)
    for run in runs:
        large = run.config.model.dim == 16
        run.job.state = state_of(5.0, run.digest, val_accuracy=0.6 if large else 0.5)
    found, rows = results_by_row(table, runs)
    assert {rows[f"ScMoE Pos-2, {size}"]["minus_baseline"]["mean"] for size in "SB"} == {0.0}
    assert rows["ScMoE Pos-2, B"]["paper"]["difference"] == pytest.approx(80.56 - 80.48)
    assert rows["DGMoE-Share Pos-2, S"]["paper"]["difference"] == pytest.approx(78.45 - 79.33)
    assert found["comparisons"] == 10


def test_a_look_waits_for_a_run_that_has_failed_once(tmp_path):
    """Decision 47: it is tried again, and only a second failure leaves its seed out."""
    table, runs = planned_of("quality", tmp_path, 2)
    table = replace(table, decision=Decision(0.01, (2,)))
    for run in runs:
        run.job.state = state_of(3.0 + run.seed / 10, run.digest)
    runs[-1].job.state = State()
    runs[-1].job.fail("no memory")
    assert results_by_row(table, runs)[0]["decision"]["reached"] == []
    runs[-1].job.fail("no memory")
    assert results_by_row(table, runs)[0]["decision"]["reached"] == [2]
