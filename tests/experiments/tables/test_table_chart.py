"""A table's charts show intervals and speeds, and say what they leave out."""

from experiments.tables.equivalence import equivalences
from experiments.tables.table_chart import draw_answers, draw_differences, draw_equal_time
from experiments.tables.table_file import Decision
from experiments.tables.table_page import markdown, without_speed
from scmoe.sweeps.jobs import State
from tests.support.tables import results_by_row, state_of, write_speeds


def test_an_interval_that_goes_on_beyond_the_scale_has_an_arrow(made, figures, tmp_path):
    table, runs = made
    for run in runs:
        loss = 5.1 if run.seed == 1 and not run.row.is_baseline else 5.0
        run.job.state = state_of(loss, run.digest) if run.seed < 3 else State()
    found, _ = results_by_row(table, runs)
    draw_differences(found, tmp_path / "chart.png")
    compared = [row["minus_baseline"] for row in found["rows"] if row["minus_baseline"]]
    assert all(minus["low"] < -1 and minus["high"] > 1 for minus in compared), (
        "of two seeds with 0 and 0.1"
    )
    ours = figures[0].axes[1]
    arrows = [line.get_marker() for line in ours.lines if line.get_marker() in "<>"]
    assert arrows == ["<", ">"] * len(compared)
    figures[0].canvas.draw()
    assert "0" in [label.get_text() for label in ours.get_xticklabels()], (
        "not 0.0000, which touches its neighbours"
    )


def test_a_row_without_a_speed_is_named_where_it_is_left_out(made, figures, tmp_path):
    table, runs = made
    write_speeds(runs[0].job.study, 0.52)
    found, _ = results_by_row(table, runs)
    assert without_speed(found) == ["ScMoE Pos-2 (L0 Pos-1), CG-1"]
    draw_equal_time(found, tmp_path / "chart.png")
    assert "L0 Pos-1" in figures[0].get_suptitle()
    assert (
        "L0 Pos-1"
        in markdown(found).partition("## Quality at equal time")[2].partition("val_loss:")[0]
    )


def test_a_table_in_which_nothing_is_compared_is_drawn(figures, tmp_path):
    alone = {"name": "top-2", "baseline": "top-2", "minus_baseline": None}
    found = {
        "rows": [alone | {"paper": {"difference": None}}],
        "unit": "nats per token",
        "scale": "smoke",
        "metric": "val_loss",
        "metrics": {"val_loss": {"better": "lower"}},
        "title": "One row",
    }
    draw_differences(found, tmp_path / "chart.png")
    assert len(figures) == 1


def test_the_chart_of_answers_says_which_side_is_better(figures, tmp_path):
    values = {"a": {1: 0.7, 2: 0.8}, "b": {1: 0.9, 2: 0.8}}
    decision = equivalences(Decision(0.01, (2,)), values, {"a": [1, 2], "b": [1, 2]})
    for better, side in (("higher", "right"), ("lower", "left")):
        found = {
            "decision": decision,
            "unit": "%",
            "metric": "accuracy",
            "metrics": {"accuracy": {"better": better}},
            "title": "T",
        }
        draw_answers(found, tmp_path / "chart.png")
        assert f"{side} is better" in figures[-1].get_suptitle()
