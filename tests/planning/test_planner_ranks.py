"""On two ranks the planner makes one choice, the fastest by its own measurements, and results do
not change."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from experiments.bench.emulated import EmulatedOperator
from experiments.engine.ranks import RankError, run_ranks
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import TopKBlock
from scmoe.moe.dispatcher import Blocking
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Capacity
from scmoe.moe.recorder import Recorder
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from scmoe.planning import candidates, pricing
from scmoe.planning import planner as planner_module
from scmoe.planning.candidates import FEWEST_ROUNDS
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.planning.planner import STEPS_EACH, WARMUP_STEPS, Planner
from scmoe.planning.pricing import (
    OPERATORS,
    Sample,
    operator_names,
    seconds_of_slowest_rank,
    start_clocks,
)
from scmoe.schedule.cost import best_schedule, slots
from scmoe.schedule.play import PER_CHUNK
from scmoe.schedule.schedule import Schedule
from tests.support.models import DIM, EXPERTS, FFN, randomise, tiny_shortcut, tiny_sublayers

pytestmark = pytest.mark.ranks
ONE = patch.object(candidates, "CANDIDATES", 1)  # the lowest price is chosen, without a trial
ATTENTION_MS = 5.0  # longer than every other operator


def build(rank: int, world_size: int, attention_ms: float = 0.0) -> list[MoEBlock]:
    """Return a ScMoE pair whose last attention takes so long, and has no parts, and a standard
    pair."""
    own = range(rank * EXPERTS // world_size, (rank + 1) * EXPERTS // world_size)

    def stream() -> MoEStream:
        dispatcher = AllToAllDispatcher(dist.group.WORLD, EXPERTS)
        return MoEStream(
            Router(DIM, EXPERTS, 1), Experts(DIM, FFN, EXPERTS, own), dispatcher, Capacity(2.0)
        )

    slow = tiny_sublayers()
    slow[2] = nn.Sequential(slow[2], EmulatedOperator(attention_ms))
    shortcut = tiny_shortcut(stream(), Schedule("scmoe", "pos2", 3), slow)
    standard = TopKBlock(tiny_sublayers(), nn.LayerNorm(DIM), stream(), Schedule("top_k"))
    return [randomise(block.double()) for block in (shortcut, standard)]


def train(blocks: list[MoEBlock], optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(2, 8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for block in blocks:
        x = block(x).y_BSD
    x.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@ONE
def training(
    rank: int, world_size: int, kind: str
) -> tuple[list[torch.Tensor], ModelChoice | None, int]:
    """Return weights after some SGD steps, the choice, and how many steps waited for each
    transfer at once."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    blocks = build(rank, world_size, ATTENTION_MS)
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters()], lr=0.1)
    planner = Planner(
        nn.ModuleList(blocks), None, torch.device("cpu"), chunk_counts=(1,), fixed=kind == "fixed"
    )
    blocking = 0
    for step in range(WARMUP_STEPS + STEPS_EACH + 4):
        if kind != "none":
            planner.begin_step(timed=step % 2 == 0)
            blocking += isinstance(blocks[0].moe.dispatcher, Blocking)
            assert not planner.recorders or None not in {
                recorder.zero for recorder in planner.recorders
            }
        train(blocks, optimizer, seed=10 * step + rank)
        if kind != "none":
            planner.end_step()
    assert all(block.recorder is None and block.moe.recorder is None for block in blocks)
    assert not any(isinstance(block.moe.dispatcher, Blocking) for block in blocks)
    if planner.choice is not None:
        assert tuple(block.schedule for block in blocks) == planner.choice.schedule.blocks
        assert planner.overlap is not None and min(planner.overlap.seconds) > 0
    return [p.detach() for b in blocks for p in b.parameters()], planner.choice, blocking


def trainings(
    rank: int, world_size: int
) -> list[tuple[list[torch.Tensor], ModelChoice | None, int]]:
    return [training(rank, world_size, kind) for kind in ("none", "auto", "fixed")]


def test_the_choice_is_equal_on_all_ranks_and_changes_no_bit():
    plain, auto, fixed = zip(*run_ranks(trainings, 2), strict=True)
    for results in (auto, fixed):
        for (weights, _, blocking), (expected, _, _) in zip(results, plain, strict=True):
            assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
            assert blocking == STEPS_EACH
    (_, choice, _), (_, other, _) = auto
    assert choice == other and [len(layer.times) for layer in choice.layers] == [1, 1]
    whole = [
        schedule for schedule in slots(Schedule("scmoe", "pos2")) if not schedule.inside_attention
    ]
    shortcut, standard = choice.layers
    # the slow attention has no parts
    assert shortcut.schedule == best_schedule(whole, shortcut.times)
    slow_s, of_one = ATTENTION_MS / 1e3, shortcut.times[1]
    assert of_one.forward["attention"] >= slow_s and of_one.backward["attention"] >= 2 * slow_s
    assert standard.schedule == Schedule("top_k")
    assert fixed[0][1].layers[0].schedule == Schedule("scmoe", "pos2", 3)


# ---------------------------------------------------------------------- chunks

QUICK = dict.fromkeys(OPERATORS, 1e-4)
SLOW_MLP = QUICK | {"mlp": 0.1, "dispatch": 0.1}  # dispatch hides behind the MLP: slot 1


def rigged(seconds: dict[str, float], rank: int, schedule: Schedule) -> torch.Tensor:
    """Return what `noted` would: each rank has its own times, and twice the chunks make transfers
    twice as long."""
    chunks = schedule.chunks
    row = {
        op: s * (1 + 0.1 * rank) * (chunks if op in ("dispatch", "combine") else 1)
        for op, s in seconds.items()
    }
    end = sum(row.values())
    took = {op: s / (chunks if op in PER_CHUNK else 1) for op, s in row.items()}
    times = [
        [end - took[op], end] if op == "decode" else [0.0, took[op]]
        for op in operator_names(schedule)
    ]
    times.append([0.0, 0.0])  # before the tap
    return torch.tensor([times] * 2, dtype=torch.float64)


class Log(NamedTuple):
    weights: list[torch.Tensor]
    ran: list[tuple[int, int]]  # slot and chunks of the shortcut block in each step
    choices: list[ModelChoice]  # in the order in which they were made


def planned_training(
    rank: int,
    world_size: int,
    own: Schedule,
    chunk_counts: tuple[int, ...] | None,
    steps: int,
    tried: Mapping[tuple[int, int], float] | None = None,
) -> Log:
    """Take SGD steps with invented times.

    chunk_counts: None is no planner, () is a fixed one. tried: the time of a step by slot and
    chunks of the shortcut block, 1 s where it is missing; None: nothing is tried."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    blocks = build(rank, world_size)
    for block in blocks:
        schedule = own if isinstance(block, ShortcutBlock) else Schedule("top_k", chunks=own.chunks)
        block.run_as(schedule, block.moe.dispatcher)
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters()], lr=0.1)
    planner = (
        None
        if chunk_counts is None
        else Planner(
            nn.ModuleList(blocks), None, torch.device("cpu"), chunk_counts, not chunk_counts
        )
    )
    log, step = Log([], [], []), 0

    def times(recorder: object, schedule: Schedule, directions: object) -> torch.Tensor:
        return rigged(SLOW_MLP, rank, schedule)

    def slowest_step(clock: Recorder, group: object) -> float:
        assert tried is not None
        return tried.get((blocks[0].schedule.slot, blocks[0].schedule.chunks), 1.0)

    trials = patch.object(planner_module, "seconds_of_slowest_rank", slowest_step) if tried else ONE
    with patch.object(pricing, "noted", times), trials:
        for step in range(steps):
            if planner is not None:
                planner.begin_step(timed=True)
            log.ran.append((blocks[0].schedule.slot, blocks[0].schedule.chunks))
            train(blocks, optimizer, seed=10 * step + rank)
            if planner is not None:
                planner.end_step()
                if planner.choice is not None and planner.choice not in log.choices:
                    log.choices.append(planner.choice)
    log.weights.extend(p.detach() for b in blocks for p in b.parameters())
    return log


def test_schedules_of_low_price_are_tried_in_turn_and_the_one_with_the_fastest_step_is_chosen():
    """Dispatch hides behind the MLP at slots 1 to 3, so their prices are equal: only a step shows
    which is faster."""
    measured, candidates, fastest = (
        WARMUP_STEPS + 2 * STEPS_EACH,
        [(1, 1), (2, 2), (2, 1), (3, 1)],
        (2, 2),
    )
    steps = measured + FEWEST_ROUNDS * len(candidates)
    arguments = (Schedule("scmoe", "pos2", 3), (1, 2), steps + 2, {fastest: 0.9})
    for log in run_ranks(planned_training, 2, *arguments):
        assert [chunks for _, chunks in log.ran[:measured]] == [1] * WARMUP_STEPS + [
            1,
            2,
        ] * STEPS_EACH
        assert log.ran[measured:steps] == candidates * FEWEST_ROUNDS
        assert log.ran[steps:] == [fastest] * 2
        (choice,) = log.choices
        (shortcut, standard) = choice.layers
        assert list(shortcut.times) == list(standard.times) == [1, 2]
        assert shortcut.schedule == Schedule("scmoe", "pos2", *fastest)
        assert standard.schedule == Schedule("top_k", chunks=fastest[1])


def clocked(rank: int, world_size: int) -> tuple[float, float]:
    """Return the time of a step of the slowest rank, and of this one."""
    dist.init_process_group("gloo")
    clock = Recorder(torch.device("cpu"))
    start_clocks([clock], None)
    time.sleep(0.05 * rank)
    own = time.perf_counter() - clock.zero
    return seconds_of_slowest_rank(clock, None), own


def test_a_step_takes_as_long_as_on_the_slowest_rank():
    (first, _), (second, own) = run_ranks(clocked, 2)
    assert first == second >= own >= 0.05


def four_chunks(rank: int, world_size: int) -> list[Log]:
    steps = WARMUP_STEPS + STEPS_EACH + 2
    own = Schedule("scmoe", "pos2", 3, chunks=4)
    return [planned_training(rank, world_size, own, counts, steps) for counts in (None, (4,), ())]


def test_a_fixed_number_of_chunks_is_kept_in_every_step_and_no_bit_changes():
    for plain, auto, fixed in run_ranks(four_chunks, 2):
        assert {chunks for log in (plain, auto, fixed) for _, chunks in log.ran} == {4}
        chosen = auto.choices[0].layers[0].schedule
        assert chosen.slot != 3 and chosen.chunks == 4
        assert fixed.choices[0].layers[0].schedule == Schedule("scmoe", "pos2", 3, chunks=4)
        for log in (auto, fixed):
            assert all(torch.equal(w, e) for w, e in zip(log.weights, plain.weights, strict=True))


def test_a_closed_planner_leaves_nothing_on_the_blocks():
    """Training ends in the warm-up, while transfers are waited for at once, or after the choice."""
    own, chosen = Schedule("scmoe", "pos2", 3), Schedule("scmoe", "pos2", 1)
    assert run_ranks(closed_after_each, 2) == [[(True, own), (True, own), (True, chosen)]] * 2


def closed_after_each(rank: int, world_size: int) -> list[tuple[bool, Schedule]]:
    dist.init_process_group("gloo")
    return [
        closed(rank, world_size, n) for n in (0, WARMUP_STEPS + 1, WARMUP_STEPS + STEPS_EACH + 1)
    ]


def closed(rank: int, world_size: int, steps: int) -> tuple[bool, Schedule]:
    blocks = build(rank, world_size)
    planner = Planner(nn.ModuleList(blocks), None, torch.device("cpu"), (1,))
    with (
        ONE,
        patch.object(
            pricing,
            "noted",
            lambda recorder, schedule, directions: rigged(SLOW_MLP, rank, schedule),
        ),
    ):
        for _ in range(steps):
            planner.begin_step(timed=True)
            planner.end_step()
        planner.begin_step(timed=True)
    planner.close()
    blocking = any(isinstance(block.moe.dispatcher, Blocking) for block in blocks)
    recording = any(m.recorder is not None for block in blocks for m in (block, block.moe))
    return not blocking and not recording, blocks[0].schedule


def disagree(rank: int, world_size: int) -> None:
    real = pricing.price_layer

    def price(
        seconds: Mapping[int, Sample], own: Schedule, fixed: bool
    ) -> dict[int, list[LayerChoice]]:
        choices = real(seconds, own, fixed)
        times = {chunks: choices[1][0].times[1] for chunks in (1, 2)}
        other = replace(choices[1][0], schedule=Schedule("top_k", chunks=2), times=times)
        return {1: [other]} if rank == 1 and own.architecture == "top_k" else choices

    with patch.object(pricing, "price_layer", price):
        training(rank, world_size, "auto")


def test_ranks_that_choose_differently_are_stopped():
    with pytest.raises(
        RankError, match=r"rank 1 chose .*\[0, 0, 2, 1\]\], and rank 0 .*\[0, 0, 1, 1\]\]"
    ):
        run_ranks(disagree, 2)
