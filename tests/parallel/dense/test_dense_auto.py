"""`strategy.dense=auto` takes the first way that has room."""

from __future__ import annotations

import pytest

from scmoe.parallel.dense.dense_auto import memory_estimates, pick_dense, possible_modes
from scmoe.parallel.dense.memory import RankJob, Split
from scmoe.parallel.mesh import Mesh
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.assembly.rank_job import dense_estimates, rank_job
from tests.support.trainings import tiny

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


@pytest.mark.representative
def test_auto_takes_the_first_way_that_has_room():
    """A rank of 64 in nodes of 8, EP 8: twice its weights, gradients, and two moments."""
    model = build_model_on_meta(tiny("", 1))
    experts = 4 * sum(p.numel() for p in Split(model, RankJob()).experts)
    dense = 4 * sum(p.numel() for p in model.parameters()) - experts
    estimates = memory_estimates(model, Mesh(world_size=64, ep_size=8), node_size=8)
    split = {"hybrid": dense / 8 + experts / 8, "sharded": dense / 64 + experts / 8}
    assert estimates == {"replicated": 8 * (dense + experts)} | {
        way: 8 * size for way, size in split.items()
    }
    needed = {"replicated": 36.0, "hybrid": 4.5, "sharded": 3.1875}
    picked = [pick_dense(needed, memory)[0] for memory in (45.1, 44.9, 5.7, 5.5, 1.0)]
    assert picked == ["replicated", "hybrid", "hybrid", "sharded", "sharded"]
    assert possible_modes(model, 4, edp_size=4, node_size=4) == ["replicated", "sharded"]


def test_auto_splits_no_expert_whose_width_cannot_be_split():
    """`sharded` is refused there: three ranks hold each expert, of width 16."""
    config = tiny("strategy.dense=auto strategy.ep_size=1 data.global_batch_size=6", 3)
    assert list(dense_estimates(rank_job(config), build_model_on_meta(config))) == ["replicated"]
    assert list(memory_estimates(build_model_on_meta(config), Mesh(world_size=3), node_size=3)) == [
        "replicated"
    ]
