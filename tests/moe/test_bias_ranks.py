"""Routers with selection biases train equally in every layout of weights, and resume in any other.

Biases move by the load of all ranks. They are compared with one process, as every other weight is,
in float64. tests/parallel/test_ep_equality.py has them at EP 2 and 4 with replicated dense
weights.
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

pytestmark = pytest.mark.ranks

SPLIT = {
    "deepseek": split("sharded", 4, 4),
    "longcat router": split("sharded", 2, 4),
    "deepseek, zero experts": split("hybrid", 2, 4),
}
ADAMW = "optim.lr=0.01 optim.warmup_steps=2 trainer.max_steps=6"
WRITTEN, READ = "strategy.ep_size=4", split("sharded", 2, 4)


def resumed(rank: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return for each router an uninterrupted run at EP 4, and one that goes on from its
    checkpoint with split weights at EP 2."""
    found = {}
    be_on_nodes(rank, 4)
    for name, words in ROUTERS.items():
        checkpoint = folder / name / f"step={HALF}.ckpt"
        first = fit(tiny(f"{words} {ADAMW} {WRITTEN}", 4), folder / name)
        found[name] = [first, fit(tiny(f"{words} {ADAMW} {READ}", 4), None, checkpoint)]
    return found


def on_four(rank: int, world_size: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    cases = {name: f"{ROUTERS[name]} {words}" for name, words in SPLIT.items()}
    return resumed(rank, folder), train_cases(rank, world_size, cases)


def on_one(rank: int, world_size: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Go on from the checkpoints of four ranks, and train the same cases."""
    ends = {
        name: fit(tiny(f"{words} {ADAMW}"), None, folder / name / f"step={HALF}.ckpt")
        for name, words in ROUTERS.items()
    }
    return ends, train_cases(rank, world_size, dict(ROUTERS))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[Any], Any]:
    """Return what four ranks and what one process give."""
    folder = tmp_path_factory.mktemp("biases")
    four = run_ranks(on_four, 4, folder, timeout_s=280)
    (one,) = run_ranks(on_one, 1, folder)
    return four, one


@pytest.mark.parametrize("router", ROUTERS)
def test_split_dense_weights_change_no_bias(router, trained):
    four, (_, one) = trained
    assert_same([cases[router] for _, cases in four], assemble([one[router]]))


@pytest.mark.parametrize("router", ROUTERS)
def test_biases_resume_in_another_layout(router, trained):
    four, (on_one_rank, _) = trained
    uninterrupted, split_ranks = zip(*(ends[router] for ends, _ in four), strict=True)
    for ends in (split_ranks, [on_one_rank[router]]):
        error, name = largest_difference([*ends], [*uninterrupted])
        assert error <= TOLERANCE, name
    biases = [
        t for name, t in whole([*uninterrupted]).items() if name.endswith("router.bias.weight")
    ]
    assert biases and all(t.abs().max() > 1e-3 for t in biases), "biases have moved"
