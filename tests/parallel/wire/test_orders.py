"""Each communicator carries the same transfers in the same order on all ranks, whatever each rank
waits for.

In backward two communicators are in use at once: that of the experts' rows, and that of the sums of
dense gradients. Another order on another rank would hang, or sum different tensors.
tests/training/test_fake_cuda.py has both on a GPU.
"""

from __future__ import annotations

import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import scmoe
from experiments.engine.ranks import run_ranks
from experiments.engine.step import Step
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire.all_to_all import Transfer
from scmoe.parallel.wire.wire import Wire
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import Schedule

DIM, RANKS = 8, 2
SCHEDULES = [
    schedule for chunks in (1, 2) for schedule in slots(Schedule("scmoe", "pos2", chunks=chunks))
]
STEPS = 2  # DDP makes its buckets again after the first backward
pytestmark = pytest.mark.ranks
Orders = list[tuple[list[tuple[str, bool]], list[int]]]


def orders_of(rank: int, world_size: int) -> Orders:
    """Return, of the steps with each schedule, the order of rows (operator, whether in backward)
    and of sums (numbers of elements). Rank 1 starts every transfer late."""
    dist.init_process_group("gloo")
    wire = Wire(build_mesh(world_size, torch.device("cpu"), timedelta(seconds=60)))
    model, rows, sums = scmoe.ScMoEBlock(DIM, 2, 4, group=wire), [], []
    launch = Transfer.launch

    def launched(transfer: Transfer, tensor: Tensor, backward: bool) -> Tensor:
        time.sleep(2e-3 * rank)
        rows.append((transfer.operator, backward))
        return launch(transfer, tensor, backward)

    def summed(state, bucket):  # DDP refuses annotations that are strings
        sums.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    found: Orders = []
    with patch.object(Transfer, "launch", launched):
        wrapped = wrap(model, wire.mesh, bucket_cap_mb=1e-4)
        wrapped.module.register_comm_hook(None, summed)
        step, x_BSD = Step(wrapped, wire.mesh), torch.randn(2, 4, DIM)
        for schedule in SCHEDULES:
            for block in moe_blocks_of(model):
                block.run_as(schedule, block.moe.dispatcher)
            for _ in range(STEPS):
                step.backward(step.model(x_BSD)[0].square().mean())
            found.append(([*rows], [*sums]))
            rows.clear()
            sums.clear()
        wrapped.close()
    return found


def test_rows_and_sums_of_gradients_have_one_order_on_all_ranks():
    ours, theirs = run_ranks(orders_of, RANKS)
    assert ours == theirs
    for schedule, (rows, sums) in zip(SCHEDULES, ours, strict=True):
        forward = [(op, False) for op in schedule.operators() if op in ("dispatch", "combine")]
        backward = [
            (op, True) for op in schedule.backward_operators() if op in ("dispatch", "combine")
        ]
        assert rows == (forward + backward) * STEPS
        assert len(sums) > 2 * STEPS, "there are several buckets"
