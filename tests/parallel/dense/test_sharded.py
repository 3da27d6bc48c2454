"""Dense weights that are split over ranks change no result: N processes compute the same as one
(sharded.py).

As in test_ep_equality.py, a tiny GPT takes three SGD steps through the real Strategy and Trainer,
in float64, and losses, every gradient, norms, and the weights before and after are within 1e-12 of
one process. tests/parallel/dense/test_sharded_faults.py does so for every architecture, on four and
eight ranks.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed import ReduceOp
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from experiments.engine.ranks import run_ranks
from tests.support.cases import CLIPPED, SLOTS, split
from tests.support.comparison import assemble, assert_no_slot_changes_a_bit, assert_same
from tests.support.trainings import tiny, train, train_at_every_slot, train_cases

pytestmark = pytest.mark.ranks


def kinds_of_sums(rank: int, world_size: int) -> list[str]:
    """Return how FSDP sums the gradients of a training in bfloat16."""
    kinds: set[str] = set()
    decide = _fsdp_collectives._get_gradient_divide_factors

    def noted(*arguments: Any) -> Any:
        decided = decide(*arguments)
        kinds.add(str(decided))
        return decided

    with patch.object(_fsdp_collectives, "_get_gradient_divide_factors", noted):
        train(tiny("strategy.dense=sharded trainer.precision=bf16-mixed", world_size))
    return sorted(kinds)


def test_gradients_are_plain_sums():
    """torch's sum with a factor gives zeros for bfloat16 on NCCL (pytorch issue 190745)."""
    plain = str((None, 1.0, ReduceOp.SUM, ReduceOp.SUM))
    assert run_ranks(kinds_of_sums, 2) == [[plain]] * 2


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


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("pos3", 2),  # it has the longest window
        *(pytest.param(name, 4, marks=pytest.mark.faults) for name in SLOTS),
    ],
)
def test_no_slot_changes_a_bit(name, world_size):
    schedule, text = SLOTS[name]
    (one,) = run_ranks(train_cases, 1, {name: text})
    cases = {name: (schedule, f"{text} {split('sharded', 2, world_size)}")}
    ranks = run_ranks(train_at_every_slot, world_size, cases)
    assert_no_slot_changes_a_bit(
        [records[name] for records in ranks], schedule, assemble([one[name]])
    )
