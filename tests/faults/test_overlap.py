"""Overlap changes no bit, however late transfers arrive and in whatever order."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.moe.dispatcher import Blocking
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.wire import all_to_all
from tests.support.comparison import assert_same_bits
from tests.support.long_training import FP32, OPTIMIZERS, TRAINING, fit
from tests.support.trainings import tiny
from tests.support.transfers import Late, Shuffled, delayed

pytestmark = [pytest.mark.dist, pytest.mark.faults]

ALL_TO_ALL = ParallelContext.dispatcher
WAYS: dict[str, list[tuple[Any, str, Any]]] = {
    "overlapped": [],
    "sequential": [(ParallelContext, "dispatcher", lambda self, *args: Blocking(ALL_TO_ALL(self, *args)))],
    "overlapped, late": [(all_to_all, "point_to_point", Late)],
    "overlapped, overtaking": [(all_to_all, "point_to_point", Shuffled)],
}


def fit_ways(rank: int, world_size: int, words: str) -> dict[str, dict[str, Any]]:
    """Returns a record for each way of waiting."""
    records = {}
    for name, patches in WAYS.items():
        with ExitStack() as stack:
            for owner, attribute, new in patches:
                new = delayed(new) if owner is all_to_all else new
                stack.enter_context(patch.object(owner, attribute, new))
            records[name] = fit(tiny(words, world_size), "adamw")
    return records


@pytest.mark.parametrize("chunks", (1, pytest.param(2, marks=pytest.mark.representative)))
def test_overlapped_is_bit_identical_to_sequential(chunks):
    words = f"{TRAINING} {OPTIMIZERS['adamw']} {FP32} strategy.ep_size=2 schedule.chunks={chunks} trainer.max_steps=10"
    ranks = run_ranks(fit_ways, 2, words, timeout_s=300)
    records = {name: [rank[name] for rank in ranks] for name in WAYS}
    for name in WAYS:
        assert_same_bits(records[name], records["sequential"])
