"""N processes must compute the same as one process (strategy, reducer, dispatcher, clipping).

A tiny model takes one or three SGD steps by the real Strategy and Trainer. These are compared with
one process: losses, every gradient (expert shards put together by global expert id), gradient
norms, and the parameters before and after. The optimizer is SGD, because AdamW would divide a wrong
scale of a gradient out again.

The bound is 1e-12 in float64: N processes do the same sums in another order, over at most some
thousand terms with rounding errors of 1e-16. A missing factor or term shows at 1e-3 or more, as
test_negative_controls.py proves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.config.fields import Config
from tests.support.cases import ARCHITECTURES, CLIP, EP2, FOUR, ONE, OTHERS, QUICK, SLOTS, TWO
from tests.support.comparison import (
    TOLERANCE,
    assemble,
    assert_no_slot_changes_a_bit,
    assert_same,
    difference,
    smallest,
)
from tests.support.trainings import train_at_every_slot, train_cases

pytestmark = pytest.mark.ranks


def on_ranks(world_size: int, cases: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    ranks = run_ranks(train_cases, world_size, cases, timeout_s=280)
    return {name: [records[name] for records in ranks] for name in cases}


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, list[Tensor]]]:
    return {name: assemble(records) for name, records in on_ranks(1, ONE).items()}


@pytest.fixture(scope="module")
def two() -> dict[str, list[dict[str, Any]]]:
    return on_ranks(2, {name: text for name, (_, text) in TWO.items()} | OTHERS)


@pytest.fixture(scope="module")
def four() -> dict[str, list[dict[str, Any]]]:
    return on_ranks(4, {name: text for name, (_, text) in FOUR.items()})


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_equal_one(case, one, two):
    assert_same(two[case], one[TWO[case][0]])


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_equal_one(case, one, four):
    assert_same(four[case], one[FOUR[case][0]])


def test_every_rank_logs_the_losses_of_all_ranks(one, two):
    for rank in two["pos2, EP 2"]:
        for name in ("train/loss", "train/load_balance_loss"):
            for own, whole in zip(rank["logged"][name], one["pos2"][name], strict=True):
                assert abs(own - whole) <= TOLERANCE


def test_no_gradient_is_near_the_tolerance(one):
    for name in QUICK:
        size, gradient = smallest(one[name])
        assert size > 1e6 * TOLERANCE, (name, gradient)


@pytest.mark.faults
def test_two_ranks_equal_one_with_every_other_architecture():
    others = {name: text for name, text in ARCHITECTURES.items() if name not in QUICK}
    one = on_ranks(1, others)
    two = on_ranks(2, {name: f"{text} {EP2}" for name, text in others.items()})
    for name in others:
        expected = assemble(one[name])
        assert_same(two[name], expected)
        size, gradient = smallest(expected)
        assert size > 1e6 * TOLERANCE, (name, gradient)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        pytest.param(2, ("pos2", "pos3", "farskip"), id="EP 2"),
        pytest.param(2, ("pos1",), id="EP 2, pos1", marks=pytest.mark.faults),
        pytest.param(4, ("pos3",), id="EP 4", marks=pytest.mark.faults),
    ],
)
def test_no_slot_changes_a_bit(ranks, names, one):
    """Chunks change rounding alone: with any number of them ranks compute what one process does
    with one."""
    cases = {name: (SLOTS[name][0], f"{SLOTS[name][1]} strategy.ep_size={ranks}") for name in names}
    of_ranks = run_ranks(train_at_every_slot, ranks, cases)
    for name, (schedule, _) in cases.items():
        assert_no_slot_changes_a_bit([records[name] for records in of_ranks], schedule, one[name])


def test_bfloat16_rows_on_the_wire_change_only_rounding(two):
    """This is off by default. Rounding is 4e-3, on the routed experts' share of a loss of 5;
    weights stay float32."""
    assert Config().strategy.wire_dtype is None
    schedule, text = SLOTS["pos2"]
    text += f" {EP2} trainer.precision=32-true strategy.wire_dtype=bfloat16"
    wire = [
        records["wire"] for records in run_ranks(train_at_every_slot, 2, {"wire": (schedule, text)})
    ]
    assert_no_slot_changes_a_bit(wire, schedule, None)
    narrow, plain = (assemble(records)["train/loss"][0] for records in (wire, two["fp32"]))
    assert 0 < abs(narrow - plain) <= 1e-2
    assert {p.dtype for p in wire[0]["after"].values()} == {torch.float32}
    assert {g.dtype for g in wire[0]["gradients"][0].values()} == {torch.float32}


def test_what_is_dropped_depends_only_on_the_number_of_data_parallel_ranks(two):
    assert_same(two["tight, EP 2"], assemble(two["tight, DP 2"]))
    error, _ = difference(assemble(two["tight, EP 2"]), assemble(two["pos2, EP 2"]))
    assert error > 1e-3, "nothing was dropped"


def test_clipping_has_an_effect(one):
    for name in ("clipped", "clipped top-2"):
        assert min(one[name]["train/grad_norm"]) > CLIP


@pytest.mark.parametrize("case", ["starved, EP 2", "starved bf16"])
def test_experts_without_tokens_have_zero_gradients(case, two):
    """Their rank computes on no rows. If gradients were None, AdamW would not decay and no
    all-reduce would run."""
    busy, idle = two[case]
    for step in range(3):
        for name in busy["experts"]:
            assert busy["gradients"][step][name].abs().max() > 0
            assert idle["gradients"][step][name].abs().max() == 0


@pytest.mark.parametrize(
    "case, reference, tolerance",
    [
        ("fp32", "pos2", 1e-5),  # rounding is 1e-7, the loss 5
        ("bf16", "pos2", 1e-2),  # rounding is 4e-3, averaged over 128 targets
        ("starved bf16", "starved", 1e-2),
    ],
)
def test_losses_in_other_precisions_are_near_those_in_float64(case, reference, tolerance, one, two):
    values = assemble(two[case])  # asserts that replicas and norms are bit-identical on both ranks
    assert all(v.isfinite().all() for steps in values.values() for v in steps)
    for loss, expected in zip(values["train/loss"], one[reference]["train/loss"], strict=False):
        assert abs(loss - expected) <= tolerance


def test_each_rank_drops_different_features(two):
    """All ranks draw weights from the same seed; they must not draw dropout from it."""
    (mine, theirs), _ = zip(*(rank["dropped"][:2] for rank in two["dropout"]), strict=True)
    assert 0.05 < mine.double().mean() < 0.15
    assert not torch.equal(mine, theirs)
    assemble(two["dropout"])  # asserts that replicas are bit-identical all the same
