"""On two ranks with slow links the planner chooses two batches in flight for top-2, runs them, and
leaves them."""

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.bench.emulated import EmulatedOperator
from experiments.engine.ranks import run_ranks
from scmoe.blocks.standard import TopKBlock
from scmoe.models.halves import Halves
from scmoe.models.residual_stream import run_blocks
from scmoe.models.run_as import schedule_of
from scmoe.moe.dispatcher import Traffic
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Capacity
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, Exchange, Work, all_to_all
from scmoe.planning.planner import MOST_TRIES, STEPS_EACH, WARMUP_STEPS, Planner
from scmoe.schedule.schedule import Schedule
from tests.support.models import DIM, EXPERTS, FFN, randomise

pytestmark = pytest.mark.ranks
SEQUENCES, SEQ_LEN = 2, 8
SUBLAYER_MS, US_PER_ROW = 3.0, 500.0


class Slow:
    """An exchange of a link that carries one transfer after another, US_PER_ROW for each row."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.free = exchange, 0.0

    def __call__(self, rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        target, work = self.exchange(rows, traffic)
        self.free = max(self.free, time.perf_counter()) + len(rows) * US_PER_ROW / 1e6
        return target, Late(work, self.free)


class Late:
    def __init__(self, work: Work, arrives: float) -> None:
        self.work, self.arrives = work, arrives

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.arrives - time.perf_counter()))


class Stack(nn.Module):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        own = range(rank * EXPERTS // world_size, (rank + 1) * EXPERTS // world_size)
        slow = Slow(all_to_all(dist.group.WORLD))

        def block() -> TopKBlock:
            dispatcher = AllToAllDispatcher(dist.group.WORLD, EXPERTS, exchange=slow)
            experts = Experts(DIM, FFN, EXPERTS, own)
            stream = MoEStream(Router(DIM, EXPERTS, 1), experts, dispatcher, Capacity(2.0))
            tokens = SEQUENCES * SEQ_LEN
            sublayers = [EmulatedOperator(SUBLAYER_MS, tokens=tokens) for _ in range(3)]
            return TopKBlock(sublayers, nn.LayerNorm(DIM), stream, Schedule("top_k"))

        self.blocks = nn.ModuleList([randomise(block().double()) for _ in range(2)])
        self.halves = Halves()

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.halves(partial(run_blocks, self.blocks), x_BSD, None)[0]


def planned(rank: int, world_size: int) -> tuple[set[int], int, Any]:
    """Return the numbers of batches in flight before the choice, the one after it, and the
    choice."""
    dist.init_process_group("gloo")
    stack = Stack(rank, world_size)
    planner = Planner(stack, None, torch.device("cpu"), (1,), numbers_in_flight=(1, 2))
    assert planner.steps_to_choose == WARMUP_STEPS + STEPS_EACH + MOST_TRIES
    x_BSD = torch.ones(SEQUENCES, SEQ_LEN, DIM, dtype=torch.float64, requires_grad=True)
    seen = set()
    while not planner.has_chosen:
        planner.begin_step()
        seen.add(schedule_of(stack).batches_in_flight)
        stack(x_BSD).sum().backward()
        planner.end_step()
    planner.begin_step(timed=True)
    chosen = schedule_of(stack).batches_in_flight
    stack(x_BSD).sum().backward()
    planner.end_step()
    assert all(block.recorder is None for block in stack.blocks)
    planner.close()
    assert schedule_of(stack).batches_in_flight == chosen
    return seen, chosen, planner.choice


def test_two_batches_are_chosen_on_slow_links():
    """A block computes 9 ms and sends 16 rows twice, which takes 16 ms."""
    ours, theirs = run_ranks(planned, 2)
    assert ours == theirs
    assert ours[:2] == ({1, 2}, 2)
    (choice, _) = ours[2].layers
    assert choice.times[1].forward["before"] >= 3 * SUBLAYER_MS / 1e3
