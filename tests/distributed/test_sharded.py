"""Dense weights that are split over ranks change no result: N processes compute the same as one (dense.py).

As in test_ep_equality.py, a tiny GPT takes three SGD steps through the real Strategy and Trainer, in float64, and
losses, every gradient, norms, and the weights before and after are within 1e-12 of one process.
tests/faults/test_sharded.py does so for every architecture, on four and eight ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from scmoe.experiments.engine.ranks import run_ranks
from tests.support.comparison import assemble, assert_same, assert_same_bits
from tests.support.sharded import FOUR, ONE
from tests.support.trainings import train_cases

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, list[Tensor]]]:
    (records,) = run_ranks(train_cases, 1, ONE)
    return {name: assemble([record]) for name, record in records.items()}


@pytest.fixture(scope="module")
def four() -> dict[str, list[dict[str, Any]]]:
    ranks = run_ranks(train_cases, 4, {name: text for name, (_, text) in FOUR.items()}, timeout_s=600)
    return {name: [records[name] for records in ranks] for name in FOUR}


@pytest.mark.faults
@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_equal_one(case, one, four):
    assert_same(four[case], one[FOUR[case][0]])


def test_a_slot_changes_no_bit(four):
    assert_same_bits(four["pos3, slot 1"], four["pos3, sequential"])
