"""Dense weights that are split over ranks change no result: N processes compute the same as one (dense.py).

As in test_ep_equality.py, a tiny GPT takes three SGD steps through the real Strategy and Trainer, in float64, and
losses, every gradient, norms, and the weights before and after are within 1e-12 of one process.
tests/faults/test_sharded.py does so for every architecture, on four and eight ranks.
"""

from __future__ import annotations

import pytest

from scmoe.experiments.engine.ranks import run_ranks
from tests.support.cases import SLOTS
from tests.support.comparison import assemble, assert_no_slot_changes_a_bit, assert_same
from tests.support.sharded import FOUR, ONE, SLOTS_ON_FOUR
from tests.support.trainings import train_at_every_slot, train_cases

pytestmark = pytest.mark.dist


@pytest.mark.faults
@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_equal_one(case):
    name, text = FOUR[case]
    (one,) = run_ranks(train_cases, 1, {name: ONE[name]})
    ranks = run_ranks(train_cases, 4, {name: text})
    assert_same([records[name] for records in ranks], assemble([one[name]]))


OTHERS = [name for name in SLOTS_ON_FOUR if name != "pos3"]  # pos3 has the longest window


@pytest.mark.parametrize("name", ["pos3", *(pytest.param(name, marks=pytest.mark.faults) for name in OTHERS)])
def test_no_slot_changes_a_bit(name):
    (one,) = run_ranks(train_cases, 1, {name: SLOTS[name][1]})
    ranks = run_ranks(train_at_every_slot, 4, {name: SLOTS_ON_FOUR[name]})
    assert_no_slot_changes_a_bit([records[name] for records in ranks], SLOTS[name][0], assemble([one[name]]))
