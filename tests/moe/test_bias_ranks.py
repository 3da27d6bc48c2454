"""Routers with selection biases train equally in every layout of weights, and resume in any other.

Biases move by the load of all ranks. They are compared with one process, as every other weight is,
in float64. tests/parallel/test_ep_equality.py has them at EP 2 and 4 with replicated dense
weights, tests/models/test_halves_ranks.py with split ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.engine.ranks import run_ranks
from tests.support.cases import ROUTERS, split
from tests.support.comparison import TOLERANCE, assemble, assert_same
from tests.support.resuming import HALF, fit, largest_difference, whole
from tests.support.trainings import be_on_nodes, tiny, train_cases

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

SPLIT = {
    "deepseek": split("sharded", 4, 4),
    "longcat router": split("sharded", 2, 4),
    "deepseek, zero experts": split("hybrid", 2, 4),
}
ADAMW = "optim.lr=0.01 optim.warmup_steps=2 trainer.max_steps=6"
WRITTEN, READ = "strategy.ep_size=4", split("sharded", 2, 4)


def on_four(
    rank: int, world_size: int, router: str, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return an uninterrupted run at EP 4 and one that goes on from its checkpoint with split
    weights at EP 2; and a training with split weights."""
    words = ROUTERS[router]
    be_on_nodes(rank, 4)
    first = fit(tiny(f"{words} {ADAMW} {WRITTEN}", 4), folder)
    second = fit(tiny(f"{words} {ADAMW} {READ}", 4), None, folder / f"step={HALF}.ckpt")
    return [first, second], train_cases(rank, world_size, {router: f"{words} {SPLIT[router]}"})


def on_one(
    rank: int, world_size: int, router: str, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Go on from the checkpoint of four ranks, and train the same case."""
    words = ROUTERS[router]
    end = fit(tiny(f"{words} {ADAMW}"), None, folder / f"step={HALF}.ckpt")
    return end, train_cases(rank, world_size, {router: words})


@pytest.fixture(scope="module", params=SPLIT)
def router(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(router, tmp_path_factory) -> tuple[list[Any], Any]:
    """Return what four ranks and what one process give."""
    folder = tmp_path_factory.mktemp("biases")
    four = run_ranks(on_four, 4, router, folder, timeout_s=280)
    (one,) = run_ranks(on_one, 1, router, folder)
    return four, one


def test_split_dense_weights_change_no_bias(router, trained):
    four, (_, one) = trained
    assert_same([cases[router] for _, cases in four], assemble([one[router]]))


def test_biases_resume_in_another_layout(trained):
    four, (on_one_rank, _) = trained
    uninterrupted, split_ranks = zip(*(ends for ends, _ in four), strict=True)
    for ends in (split_ranks, [on_one_rank]):
        error, name = largest_difference([*ends], [*uninterrupted])
        assert error <= TOLERANCE, name
    biases = [
        t for name, t in whole([*uninterrupted]).items() if name.endswith("router.bias.weight")
    ]
    assert biases and all(t.abs().max() > 1e-3 for t in biases), "biases have moved"
