"""The plan of inference: overlapped where a pass is faster for it, sequential where it is not,
equal on all ranks."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from experiments.bench.emulated import EmulatedOperator
from experiments.engine.ranks import run_ranks
from scmoe.blocks.moe_block import MoEBlock
from scmoe.inference.planned import InferencePlan, fastest, plan_inference
from scmoe.moe.dispatcher import Traffic
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, Exchange, all_to_all
from scmoe.schedule.schedule import Schedule
from tests.support.models import DIM, EXPERTS, FFN, randomise, tiny_shortcut, tiny_sublayers

pytestmark = [pytest.mark.dist, pytest.mark.inference]


@dataclass(frozen=True)
class Arrival:
    inner: Any
    at: float

    def wait(self) -> None:
        self.inner.wait()
        time.sleep(max(0.0, self.at - time.perf_counter()))


def late(seconds: float) -> Exchange:
    """Rows arrive so many seconds after they were sent, whatever the processor does meanwhile."""

    def exchange(rows: torch.Tensor, traffic: Traffic | None) -> tuple[torch.Tensor, Arrival]:
        arrived, work = all_to_all(dist.group.WORLD)(rows, traffic)
        return arrived, Arrival(work, time.perf_counter() + seconds)

    return exchange


def plan(
    rank: int, world_size: int, attention_ms: float, transfer_ms: float
) -> tuple[InferencePlan, bool]:
    """Returns the plan of a pair whose last attention and whose transfers take so long, and whether
    a pass returns the same bits as before, with the block's own schedule."""
    dist.init_process_group("gloo")
    own = range(rank * EXPERTS // world_size, (rank + 1) * EXPERTS // world_size)
    dispatcher = AllToAllDispatcher(dist.group.WORLD, EXPERTS, exchange=late(transfer_ms / 1e3))
    stream = MoEStream(Router(DIM, EXPERTS, 1), Experts(DIM, FFN, EXPERTS, own), dispatcher)
    sublayers = tiny_sublayers()
    sublayers[2] = nn.Sequential(sublayers[2], EmulatedOperator(attention_ms))
    schedule = Schedule("scmoe", "pos2", 3)
    block: MoEBlock = randomise(tiny_shortcut(stream, schedule, sublayers).double())
    x = torch.randn(2, 8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        before = block(x).y_BSD
        chosen = plan_inference(
            [block], lambda: block(x), None, torch.device("cpu"), chunk_counts=(1,)
        )
        assert (
            block.schedule == schedule
            and block.moe.dispatcher is dispatcher
            and block.recorder is None
        )
        chosen.run([block], [dispatcher])
        return chosen, torch.equal(block(x).y_BSD, before)


def test_overlap_is_planned_where_it_makes_a_pass_faster():
    """One transfer hides behind the attention, whatever the slot. Times are long beside what other
    tests add."""
    (first, same), (second, same_too) = run_ranks(plan, 2, 120.0, 60.0)
    assert first == second and same and same_too
    assert first.overlapped
    assert first.seconds["overlapped x 1"] < first.seconds["sequential"]
    assert "overlapped, slot" in str(first)


def test_overlap_that_gains_too_little_is_planned_sequential():
    assert (
        fastest({"sequential": 1.0, "overlapped x 1": 0.99, "overlapped x 2": 1.2}) == "sequential"
    )
    assert (
        fastest({"sequential": 1.0, "overlapped x 1": 0.99, "overlapped x 2": 0.97})
        == "overlapped x 2"
    )
