"""Rows that go over a bus arrive unchanged at every rate, and the rate is searched for the share of
communication.

On a machine without a GPU rows are copied at once; tests/parallel/wire/test_cuda.py has the stream.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from experiments.bench import emulated
from experiments.bench.rank_bench import Bench
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.engine.ranks import run_ranks
from scmoe.moe.recorder import Recorder
from scmoe.schedule.schedule import Schedule

SMALL = dict(dim=64, ffn_dim=128, tokens=512, seq_len=64, compute="real", links="bus")


@pytest.mark.parametrize("rate", (0.3, 0.5, 1.0, 1.7, 1000.0))
def test_rows_arrive_unchanged_at_every_rate(rate):
    rows = torch.randn(40, 8, requires_grad=True)
    target, work = emulated.over_the_bus(torch.device("cpu"), rate)(rows, None)
    work.wait()
    assert (
        torch.equal(target, rows)
        and target.data_ptr() != rows.data_ptr()
        and not target.requires_grad
    )


@pytest.mark.parametrize(
    "rate, numbers", [(0.4, [40, 40, 20]), (0.5, [40, 40]), (1.0, [40]), (4.0, [10]), (1e4, [])]
)
def test_a_rate_is_reached_by_the_number_of_rows_that_travel(rate, numbers):
    assert emulated.travelling(40, rate) == numbers


def noted(rank: int, world_size: int) -> list[str]:
    dist.init_process_group("gloo")
    bench = Bench(Setting(0.5, rows=("scmoe_pos2",), dtype="bfloat16", **SMALL))
    recorder = Recorder(bench.device)
    bench.set(Variant("pos2", Schedule("scmoe", "pos2", 1)), recorder).train(bench.x)
    block = bench.stacks["pos2"][0]
    assert {p.dtype for p in block.parameters()} - {
        p.dtype for p in block.moe.router.parameters()
    } == {torch.bfloat16}
    return [
        span.operator for direction in ("forward", "backward") for span in recorder.spans(direction)
    ]


@pytest.mark.ranks
def test_transfers_over_the_bus_are_noted_in_both_directions():
    found = run_ranks(noted, 1)[0]
    assert (found.count("dispatch"), found.count("combine")) == (2, 2)
