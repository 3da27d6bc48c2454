"""A table's page says what is missing, and sets speeds beside the paper's."""

import pytest

from experiments.tables.seed_statistics import seeds_needed
from experiments.tables.table_page import heading, markdown
from experiments.tables.table_report import write_report
from scmoe.sweeps.jobs import State
from tests.support.tables import planned_of, results_by_row, state_of, write_speeds


def test_a_row_without_a_run_is_empty(made):
    table, runs = made
    for run in runs:
        if run.row is table.rows[1] or run.seed > 1:
            run.job.state = State()
    found, rows = results_by_row(table, runs)
    assert (
        rows["shared-expert, CG-2"]["ours"]["n"],
        rows["shared-expert, CG-2"]["params_total"],
    ) == (0, None)
    one = rows["ScMoE Pos-2, Direct Add"]
    assert (one["ours"]["std"], one["minus_baseline"]["mean"]) == (None, pytest.approx(0.022))
    assert (one["minus_baseline"]["low"], one["minus_baseline"]["p"]) == (None, None)
    text = markdown(found)
    assert "mean nothing" in text, "it is the scale smoke"
    assert "| shared-expert, CG-2 |  | 3.2406 | -0.0298 | (0) |  |  | (0) |" in text
    write_report(table, "smoke", runs, "")


def test_the_first_line_says_how_many_seeds_the_papers_differences_need(made):
    table, runs = made
    found, _ = results_by_row(table, runs)
    compared = [row for row in found["rows"] if row["minus_baseline"]]
    for std, lines in ((0.0001, 0), (0.1, 1)):
        for row in compared:
            row["minus_baseline"]["std"] = std
        assert len(heading(found)) == 2 + lines, "title, what the scale smoke means"
    sizes = [abs(row["paper"]["difference"]) for row in compared]
    comparisons = len(compared)
    least = seeds_needed(0.1, max(sizes), comparisons)
    most = seeds_needed(0.1, min(sizes), comparisons)
    assert f"{least} to {most} seeds a row" in heading(found)[-1]


def test_speeds_stand_beside_the_papers_and_a_missing_one_says_why(tmp_path):
    table, runs = planned_of("table1", tmp_path, 1)
    for run in runs:
        run.job.state = state_of(5.0, run.digest, val_accuracy=0.5)
    found, rows = results_by_row(table, runs)
    assert rows["ScMoE Pos-2"]["others"]["training speed-up"]["ours"]["why"].startswith(
        "not measured"
    )
    assert "A speed without a number: not measured" in markdown(found)
    write_speeds(runs[0].job.study, 0.52)
    found, rows = results_by_row(table, runs)
    own = rows["ScMoE Pos-2"]["others"]["training speed-up"]["ours"]
    assert (own["mean"], own["quartiles"], own["n"], own["links"]) == (1.5, [1.1, 1.9], 9, "shaped")
    assert found["rows"][0]["ours"]["mean"] == 50.0, (
        "a share of images is shown in percent, as in the paper"
    )
    row = "| ScMoE Pos-2 | 1.43; 1.50 [1.10, 1.90] | 1.66; 1.75 [1.10, 2.00] |"
    assert row in markdown(found)
    assert "training speed-up, times (paper; ours)" in markdown(found)
