"""Rows of benches with two batches in flight: their names, what is refused, and what they are
compared with."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench.overlap.row_figures import over_best
from experiments.bench.pairs import ROWS, default_schedule, usual_rows
from experiments.bench.rank_bench import VariantTimes
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.bench.training.slow_network import ROWS_OF_TWO_BATCHES, TRAINED_ROWS, row_overrides
from scmoe.command_line import call
from scmoe.config.halved_batches import may_run_two_batches
from scmoe.config.load import load_config
from scmoe.predict.row_names import architecture_of, batches_of
from scmoe.schedule.schedule import Schedule


@pytest.mark.parametrize("every", ROWS)
def test_each_row_in_one_chunk_has_rows_in_halves_which_are_measured_by_request(every):
    one = [row for row in ROWS[every] if batches_of(row) == 1 and not row.endswith("_pipelined")]
    for row in one:
        assert ROWS[every][f"{row}_two"] == ROWS[every][row] == (ROWS[every][row][0], (1,))
        assert ROWS[every][f"{row}_two_pipelined"] == (ROWS[every][row][0], (2,))
        assert architecture_of(f"{row}_two_pipelined") == architecture_of(f"{row}_pipelined") == row
    assert {batches_of(row) for row in usual_rows(every)} == {1}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("overlap --rows top2_two --tokens 256 --seq-len 256", "--rows has top2_two, which halves"),
        (
            "overlap --rows top2_two --tokens 512 --seq-len 256 --load ragged:1.5",
            "--rows has top2_two, which halves",
        ),
        ("overlap --level iteration --layers 3", "--layers is 3, allowed: multiples"),
    ],
)
def test_impossible_halves_are_refused(words, says, capsys):
    assert call("bench", *words.split()) == 2
    assert says in capsys.readouterr().err


def test_the_rows_of_a_training_in_halves_differ_in_the_schedule_alone():
    assert ROWS_OF_TWO_BATCHES.keys() == {f"{row}_two" for row in TRAINED_ROWS}
    for row in TRAINED_ROWS:
        one, two = (
            load_config(None, ["trainer.devices=2", *row_overrides(r)]) for r in (row, f"{row}_two")
        )
        assert two.schedule.batches_in_flight == 2 and not two.schedule.auto
        assert not may_run_two_batches(one) or not one.schedule.auto, "as its name says"
        assert (two.moe, two.model, two.data) == (one.moe, one.model, one.data)


def seconds(*train):
    train_s = np.array(train)
    return VariantTimes(train_s / 3, train_s, train_s / 3, 0.0)


def test_a_row_is_compared_with_the_best_of_top_2_and_with_the_best_without_a_shortcut():
    took = {
        "top2": (10.0, 10.0),
        "top2_two": (6.0, 8.0),
        "shared_expert_two": (5.0, 5.0),
        "scmoe_pos2": (4.0, 4.0),
        "top1": (1.0, 1.0),  # another model
    }
    setting = Setting(rows=tuple(took))
    variants = {row: Variant(row, Schedule("top_k")) for row in took}
    times = {variants[row]: seconds(*train) for row, train in took.items()}
    times[Variant("top2", default_schedule("top2"), "sequential")] = seconds(12.0, 12.0)
    rows = {row: SimpleNamespace(finalists=[variant]) for row, variant in variants.items()}
    measured = SimpleNamespace(setting=setting, times=times, rows=rows, load="balanced")
    comparisons = over_best(measured, "scmoe_pos2")  # type: ignore[arg-type]
    for kind in ("forward", "train"):
        top2, without = (over[kind] for over in comparisons.values())
        assert (top2["best"], without["best"]) == ("top2_two", "shared_expert_two")
        assert (top2["median"], without["median"]) == (pytest.approx(1.75), pytest.approx(1.25))
    of_itself = over_best(measured, "top2_two")  # type: ignore[arg-type]
    assert of_itself["over_best_without_another_model"]["train"]["median"] == 1.0
    del rows["top2"], rows["top2_two"]
    alone = over_best(measured, "scmoe_pos2")  # type: ignore[arg-type]
    assert alone["over_best_without_another_model"]["train"]["best"] == "top2, sequential"


def test_a_row_gains_nothing_by_a_schedule_that_is_lucky_in_most_rounds():
    """Both of its schedules take as long as top-2 on average; one has faster and slower rounds."""
    setting, schedule = Setting(rows=("scmoe_pos2",)), default_schedule("pos2")
    even, lucky = Variant("pos2", schedule), Variant("pos2", schedule, "lucky")
    top2 = Variant("top2", default_schedule("top2"), "sequential")
    times = {each: seconds(1.0, 1.0, 1.0, 1.0, 1.0) for each in (even, top2)}
    times[lucky] = seconds(0.8, 1.3, 0.8, 1.3, 0.8)
    rows = {"scmoe_pos2": SimpleNamespace(best=lucky, finalists=[even, lucky])}
    measured = SimpleNamespace(setting=setting, times=times, rows=rows, load="balanced")
    for gains in over_best(measured, "scmoe_pos2").values():  # type: ignore[arg-type]
        assert gains["train"]["median"] == 1.0
