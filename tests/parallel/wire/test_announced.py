"""Fault 31: a dropless layer refuses more rows than its ceiling, on all ranks, before memory is
allocated."""

from __future__ import annotations

import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from experiments.engine.ranks import run_ranks
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from scmoe.parallel.wire.announced import CeilingError, ReadByHost, check_ceiling
from scmoe.parallel.wire.wire import Wire
from scmoe.training.assembly.model import build_model, build_module
from tests.support.failing import failure
from tests.support.trainings import fit, tiny

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


def all_to_one(rank: int, world_size: int, *ceilings: str) -> None:
    """Train once for each ceiling. All rows go to one of two ranks: twice the fair share, and no
    more."""
    for ceiling in ceilings:
        train_collapsed(world_size, ceiling)


def train_collapsed(world_size: int, ceiling: str) -> None:
    config = tiny(f"position=pos2 moe.dropless_ceiling={ceiling} strategy.ep_size=2", world_size)
    module = build_module(config)
    configure = module.configure_model

    def collapsed() -> None:
        configure()
        for block in module.model.blocks:
            with torch.no_grad():
                block.tap_norm.weight[0], block.tap_norm.bias[0] = 0.0, 20.0
                block.moe.router.gate.weight[:, 0] = torch.tensor([5.0] + [-5.0] * 7)

    module.configure_model = collapsed
    try:
        fit(config, module=module)
    finally:
        assert all(
            isinstance(m.dispatcher, AllToAllDispatcher)
            for m in module.modules()
            if isinstance(m, MoEStream)
        )


@pytest.mark.representative
@pytest.mark.parametrize(
    ("words", "first"),
    [
        (
            "1.5",
            r"CeilingError: rank 0 of .* would receive \d+ rows, allowed: 1.5 x the fair share",
        ),
        (
            "1.5 moe.rows=buffers moe.overflow=refuse",
            r"MemoryError: \d+ routed copies of this step did not fit",
        ),
    ],
)
def test_a_ceiling_ends_all_ranks(words, first):
    """Before memory is allocated, or after the step in which a buffer was full. Both ranks have the
    same error."""
    message = failure(all_to_one, 2, words, all_fail=True)
    assert re.search(first, message)
    assert re.search(rf"rank [01], later: .*{first.split()[0]}", message)


@pytest.mark.representative
def test_what_a_ceiling_allows():
    """Buffers for three quarters of the rows drop the others where that is not refused."""
    run_ranks(
        all_to_one, 2, "2", "null", "1.5 moe.rows=buffers", "2 moe.rows=buffers moe.overflow=refuse"
    )


def three_tokens(rank: int, world_size: int) -> str:
    """Return the error of a training's forward of three equal tokens, and compute them without
    gradients, as when a text is generated."""
    dist.init_process_group("gloo")
    wire = Wire(build_mesh(2, torch.device("cpu"), timedelta(seconds=60)))
    model = build_model(
        tiny("position=pos2 moe.dropless_ceiling=1.5 strategy.ep_size=2", world_size), wire
    )
    ids_BS = torch.tensor([[1], [1], [1]])
    with torch.no_grad():
        model(ids_BS)
    try:
        model(ids_BS)
    except CeilingError as error:
        return str(error)
    return ""


@pytest.mark.representative
def test_a_ceiling_holds_in_training_alone():
    """Three equal tokens a rank go to one rank: 6 rows, and the fair share is 3."""
    assert all("would receive 6 rows" in error for error in run_ranks(three_tokens, 2))


def test_chunks_do_not_change_what_a_ceiling_allows():
    """The first chunk goes to rank 0 and the second to rank 1, so that both receive their fair
    share."""
    rows = torch.tensor([[[[4], [0]], [[0], [4]]]] * 2)  # [sender, chunk, receiver, e]
    counts = ReadByHost(SimpleNamespace(wait=lambda: None), rows, rank=0, ceiling=1.0).wait()
    assert [chunk.traffic.received for chunk in counts] == [[4, 4], [0, 0]]


def test_the_ceiling_is_a_multiple_of_the_fair_share():
    check_ceiling([15, 5], 1.5)
    check_ceiling([0, 0], 1.0)
    with pytest.raises(MemoryError, match=r"rank 1 .* 16 rows, allowed: 1.5 x .* of 10 "):
        check_ceiling([4, 16], 1.5)
