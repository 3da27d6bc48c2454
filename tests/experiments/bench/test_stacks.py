"""Rows of `bench overlap --every 1` compute what the equations of their wirings say, and no
schedule changes a bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.bench.pairs import ROWS, default_schedule
from experiments.bench.rank_bench import Bench
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.engine.ranks import run_ranks
from scmoe.blocks.moe_block import MoEBlock
from scmoe.schedule.cost import slots
from tests.support.models import assert_close

pytestmark = pytest.mark.ranks
SIZES = dict(dim=16, ffn_dim=32, heads=2, tokens=32, seq_len=16, attention_ms=0.3, links="loopback")
OWN = ("scmoe_pos1", "scmoe_pos2", "farskip")


def by_equations(name: str, blocks: Sequence[MoEBlock], x: Tensor) -> Tensor:
    """Return X of the last block by the equations of docs/shortcuts.md. M and Y: what a block hands
    on."""
    handed_on = None
    for block in blocks:
        (attention,), norm, shared, routed = (
            block.sublayers,
            block.norm,
            block.shared_expert,
            block.moe,
        )
        if name == "farskip":
            u = norm(x)
            handed_on = attention(x if handed_on is None else handed_on, onto=x) + shared(u)
            x = handed_on + routed(u).y_BSD
            continue
        m = attention(x)
        if name == "nvidia":
            x = m + block.after.norm(shared(norm(m)) + routed(block.tap_norm(x)).y_BSD)
        else:
            x = (
                m
                + shared(norm(m))
                + routed(block.tap_norm(m if handed_on is None else handed_on)).y_BSD
            )
            handed_on = m
    return x


def check_row(bench: Bench, name: str) -> None:
    """Raise AssertionError: outputs or gradients of a schedule differ from those of the sequential
    one."""
    blocks = bench.stacks[name]

    def results(variant: Variant) -> list[Tensor]:
        step = bench.set(variant)
        y = step.model(bench.x)
        step.backward(y, torch.ones_like(y))
        gradients = [p.grad for block in blocks for p in block.parameters() if p.grad is not None]
        found = [y.detach(), bench.x.grad, *gradients]
        step.model.zero_grad()
        bench.x.grad = None
        return found

    for chunks in (1, 2):
        places = slots(replace(default_schedule(name), chunks=chunks))
        expected = results(Variant(name, places[0], "sequential"))
        assert_close(expected[0], by_equations(name, blocks, bench.x).detach(), 1e-6, name)
        shorter = slots(replace(blocks[0].schedule, chunks=chunks))
        mixed = Variant(name, places[-1], schedules=(shorter[0], places[-1]))
        for variant in [*(Variant(name, place) for place in places), mixed]:
            found = results(variant)
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (
                f"{name} {variant}"
            )
            assert [block.schedule for block in blocks] == variant.block_schedules(
                block.schedule for block in blocks
            )
        halves = results(replace(mixed, batches_in_flight=2))
        for half, one in zip(halves, expected, strict=True):
            assert_close(half, one, 1e-5, f"{name} in halves")


def check(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    for compute in ("real", "emulated"):
        bench = Bench(Setting(every=1, compute=compute, rows=OWN, layout="dropless", **SIZES))
        for name in (ROWS[1][row][0] for row in OWN):
            check_row(bench, name)


def dropped(rank: int, world_size: int) -> float:
    dist.init_process_group("gloo")
    load = "rotating:2:1"
    bench = Bench(Setting(rows=("top2",), loads=(load,), layout="capacity:1", **SIZES))
    return bench.dropped(Variant("top2", default_schedule("top2"), load=load))


def sequences_seen(rank: int, world_size: int, level: str) -> list[int]:
    """Return how many sequences each call of the first block had: in one batch, then in two."""
    dist.init_process_group("gloo")
    bench = Bench(Setting(level=level, rows=("top2",), **SIZES))
    seen: list[int] = []
    bench.stacks["top2"][0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    variant = Variant("top2", default_schedule("top2"))
    bench.seconds(variant)
    bench.seconds(replace(variant, batches_in_flight=2))
    return seen


@pytest.mark.parametrize("level", ["block", "iteration"])
def test_a_row_with_two_batches_in_flight_computes_halves(level):
    """At the level of an iteration, the blocks are inside DDP, which would keep the number of
    batches for itself."""
    forward_and_step = [[2] * 2 + [1] * 4]
    assert run_ranks(sequences_seen, 2, level) == forward_and_step * 2


def test_what_is_dropped_is_the_mean_over_the_routings_of_a_load():
    """All rows go to one of two ranks, whose experts have room for half of them."""
    assert run_ranks(dropped, 2) == [0.5, 0.5]


def test_rows_compute_their_equations_and_no_schedule_changes_a_bit():
    run_ranks(check, 2)
