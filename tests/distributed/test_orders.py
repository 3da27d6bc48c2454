"""Each communicator carries the same transfers in the same order on all ranks, whatever each rank waits for.

Two communicators are in use at once in backward: rows of the experts, and sums of dense gradients. Another order on
another rank would hang, or sum different tensors. tests/unit/test_fake_cuda.py has the order of both on a GPU.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import scmoe
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.experiments.engine.ranks import run_ranks
from scmoe.experiments.engine.step import Step
from scmoe.parallel.mesh import build_context
from scmoe.parallel.update.pacing import REDUCTIONS, Pacer
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire import all_to_all
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import Schedule

DIM, RANKS = 8, 2
SCHEDULES = [schedule for chunks in (1, 2) for schedule in slots(Schedule("scmoe", "pos2", chunks=chunks))]
STEPS = 2  # DDP makes its buckets anew after the first backward
pytestmark = pytest.mark.dist


class Orders:
    """What each communicator was given, in order. Rank 1 is late with everything."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.gradients: list[int] = []

    def row(self, real: Any, target: Tensor, rows: Tensor, *rest: Any) -> list[Any]:
        time.sleep(1e-3 * dist.get_rank())
        self.rows.append((*rows.shape,))
        return real(target, rows, *rest)

    def bucket(self, state: Any, bucket: dist.GradBucket) -> Any:
        time.sleep(1e-3 * dist.get_rank())
        self.gradients.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    def piece(self, real: Any, pacer: Pacer, flat: Tensor) -> Any:
        self.gradients.append(flat.numel())
        return real(pacer, flat)


@contextmanager
def recorded(orders: Orders) -> Any:
    post, start = all_to_all.post, Pacer.start
    with (
        patch.object(all_to_all, "post", lambda *given: orders.row(post, *given)),
        patch.object(Pacer, "start", lambda pacer, flat: orders.piece(start, pacer, flat)),
    ):
        yield


def orders_of(rank: int, world_size: int, reductions: str) -> list[tuple[list[tuple[int, ...]], list[int]]]:
    """Returns the order of rows and that of gradients, of some steps with each schedule."""
    context = build_context(world_size, torch.device("cpu"), timedelta(seconds=60))
    model = scmoe.ScMoEBlock(DIM, 2, 4, group=context)
    wrapped = wrap(model, context, reductions, bucket_cap_mb=1e-4)
    found = []
    if reductions == "ddp":
        hooked: list[Orders] = [Orders()]
        wrapped.module.register_comm_hook(None, lambda state, bucket: hooked[0].bucket(state, bucket))
    step, x_BSD = Step(wrapped, context), torch.randn(2, 4, DIM)
    for schedule in SCHEDULES:
        orders = Orders()
        if reductions == "ddp":
            hooked[0] = orders
        for block in moe_blocks_of(model):
            block.run_as(schedule, block.moe.dispatcher)
        with recorded(orders):
            for _ in range(STEPS):
                step.backward(step.model(x_BSD)[0].square().mean())
        found.append((orders.rows, orders.gradients))
    wrapped.close()
    return found


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_rows_and_gradients_have_one_order_on_all_ranks(reductions):
    ours, theirs = run_ranks(orders_of, RANKS, reductions)
    assert ours == theirs
    for schedule, (rows, gradients) in zip(SCHEDULES, ours, strict=True):
        assert len(rows) == 4 * schedule.chunks * STEPS, "dispatch and combine, and the way back of both gradients"
        assert len(gradients) > 2 * STEPS, "several buckets"


def test_the_schedules_differ_in_their_chunks_and_slots():
    assert len(SCHEDULES) == 8 and {replace(schedule, expert_slot=0) for schedule in SCHEDULES} < set(SCHEDULES)
