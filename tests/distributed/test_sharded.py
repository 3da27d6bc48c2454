"""Dense weights that are split over ranks change no result: N processes compute the same as one
(dense.py).

As in test_ep_equality.py, a tiny GPT takes three SGD steps through the real Strategy and Trainer,
in float64, and losses, every gradient, norms, and the weights before and after are within 1e-12 of
one process. tests/faults/test_sharded.py does so for every architecture, on four and eight ranks.
"""

from __future__ import annotations

import pytest

from experiments.engine.ranks import run_ranks
from tests.support.cases import CLIPPED, SLOTS, split
from tests.support.comparison import assemble, assert_no_slot_changes_a_bit, assert_same
from tests.support.trainings import train_at_every_slot, train_cases

pytestmark = pytest.mark.dist


CASES = {  # case: words of one process, further ones of four
    "clipped, EP 2": (f"position=pos2 top_k=2 {CLIPPED}", split("sharded", 2, 4)),
    "norm, recompute, hybrid, EP 1": (
        f"position=pos3 tap_norm=shared {CLIPPED}",
        f"trainer.recompute=true {split('hybrid', 1, 4)}",
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_equal_one(case):
    text, further = CASES[case]
    (one,) = run_ranks(train_cases, 1, {case: text})
    ranks = run_ranks(train_cases, 4, {case: f"{text} {further}"})
    assert_same([records[case] for records in ranks], assemble([one[case]]))


OTHERS = [name for name in SLOTS if name != "pos3"]  # pos3 has the longest window


@pytest.mark.parametrize(
    "name", ["pos3", *(pytest.param(name, marks=pytest.mark.faults) for name in OTHERS)]
)
def test_no_slot_changes_a_bit(name):
    schedule, text = SLOTS[name]
    (one,) = run_ranks(train_cases, 1, {name: text})
    ranks = run_ranks(
        train_at_every_slot, 4, {name: (schedule, f"{text} {split('sharded', 2, 4)}")}
    )
    assert_no_slot_changes_a_bit(
        [records[name] for records in ranks], schedule, assemble([one[name]])
    )
