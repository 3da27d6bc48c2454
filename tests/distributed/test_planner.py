"""The planner on two ranks: one plan for all, the cheapest of its own measurements, and never another result."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import TopKBlock
from scmoe.moe.coefficient import CG1
from scmoe.moe.dispatcher import Blocking
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel import planner as planning
from scmoe.parallel.dispatcher import AllToAllDispatcher
from scmoe.parallel.planner import DRIFTED_IN_TURN, STEPS_EACH, TRIES_EACH, WARMUP_STEPS, Overlap, Plan, Planner
from scmoe.schedule.cost import OperatorTimes, best_schedule, slots
from scmoe.schedule.schedule import Schedule
from scmoe.testbed.emulated import EmulatedOperator
from scmoe.testbed.ranks import RankError, run_ranks
from scmoe.training.callbacks.adaptive_schedule import plan_lines, what_ran
from tests.support.models import DIM, EXPERTS, FFN, randomise, tiny_sublayers

pytestmark = pytest.mark.dist


def build(rank: int, world_size: int) -> list[nn.Module]:
    """A ScMoE pair with a slow attention, and a standard one."""
    own = range(rank * EXPERTS // world_size, (rank + 1) * EXPERTS // world_size)

    def stream() -> MoEStream:
        dispatcher = AllToAllDispatcher(dist.group.WORLD, EXPERTS)
        return MoEStream(Router(DIM, EXPERTS, 1), Experts(DIM, FFN, EXPERTS, own), dispatcher, 2.0)

    norms = [nn.LayerNorm(DIM) for _ in range(3)]
    slow = tiny_sublayers()
    slow[2] = nn.Sequential(slow[2], EmulatedOperator(20.0))
    shortcut = ShortcutBlock(slow, norms[0], norms[1], nn.Linear(DIM, DIM), CG1(DIM), stream(), Schedule("pos2", 3))
    return [randomise(b.double()) for b in (shortcut, TopKBlock(tiny_sublayers(), norms[2], stream()))]


def training(rank: int, world_size: int, kind: str) -> tuple[list[torch.Tensor], list[Plan] | None, int]:
    """Weights after some SGD steps, the plans, and how many expert runs waited for their transfers at once."""
    dist.init_process_group("gloo")
    blocks = build(rank, world_size)
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters()], lr=0.1)
    planner = Planner(blocks, None, torch.device("cpu"), chunk_counts=(1,), fixed=kind == "fixed")
    blocking = 0
    for step in range(WARMUP_STEPS + STEPS_EACH + 4):
        x = torch.randn(2, 8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
        if kind != "none":
            planner.begin_step(timed=step % 2 == 0)
            blocking += isinstance(blocks[0].moe.dispatcher, Blocking)
        for block in blocks:
            x = block(x).y_BSD
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if kind != "none":
            planner.end_step()
    assert all(block.recorder is None and block.moe.recorder is None for block in blocks)
    assert not any(isinstance(block.moe.dispatcher, Blocking) for block in blocks)
    if planner.plans is not None:
        assert [block.schedule for block in blocks] == [plan.schedule for plan in planner.plans]
        assert planner.overlap is not None and min(planner.overlap.seconds) > 0
    return [p.detach() for b in blocks for p in b.parameters()], planner.plans, blocking


def test_a_plan_is_the_same_on_all_ranks_and_changes_no_bit():
    plain = run_ranks(training, 2, "none")
    auto = run_ranks(training, 2, "auto")
    fixed = run_ranks(training, 2, "fixed")
    for results in (auto, fixed):
        for (weights, _, blocking), (expected, _, _) in zip(results, plain, strict=True):
            assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
            assert blocking == STEPS_EACH
    (_, plans, _), (_, others, _) = auto
    assert plans == others and [len(plan.times) for plan in plans] == [1, 1]
    assert plans[0].schedule == best_schedule(slots(Schedule("pos2")), plans[0].times)
    assert plans[0].times[1].forward["attention"] >= 20e-3 and plans[0].times[1].backward["attention"] >= 40e-3
    assert plans[1].schedule == Schedule("top_k")
    assert fixed[0][1][0].schedule == Schedule("pos2", 3)


# ---------------------------------------------------------------------- chunks, and times that change

QUICK = dict.fromkeys(planning.OPERATORS, 1e-4)
SLOW_MLP = QUICK | {"mlp": 0.1, "dispatch": 0.1}  # dispatch hides behind the MLP: slot 1
SLOW_ATTENTION = QUICK | {"attention": 0.3, "dispatch": 0.3}  # behind attention: slot 2


def rigged(seconds: dict[str, float], rank: int, chunks: int, window: dict[int, float] | None = None) -> torch.Tensor:
    """A layer's measured times: everybody's own, and with more chunks twice the time of every transfer.

    window: by number of chunks, the time from tap to end; the sum of the operators' where it is not told."""
    row = [s * (1 + 0.1 * rank) * (chunks if op in ("dispatch", "combine") else 1) for op, s in seconds.items()]
    return torch.tensor([[*row, (window or {}).get(chunks, sum(row))]] * 2, dtype=torch.float64)


class Log(NamedTuple):
    weights: list[torch.Tensor]
    ran: list[tuple[int, int]]  # slot and chunks of the shortcut block in each step
    plans: list[list[Plan]]  # in the order in which they were made


def planned_training(
    rank: int,
    world_size: int,
    own: Schedule,
    chunk_counts: tuple[int, ...] | None,
    steps: int,
    drifts_at: int = 10**6,
    window: dict[int, float] | None = None,
) -> Log:
    """SGD steps on times that are made up, and change at a step. chunk_counts None: no planner; (): a fixed one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    blocks = build(rank, world_size)
    for block in blocks:
        block.schedule = own if isinstance(block, ShortcutBlock) else Schedule("top_k", chunks=own.chunks)
        block.moe.num_chunks = own.chunks
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters()], lr=0.1)
    planner = (
        None if chunk_counts is None else Planner(blocks, None, torch.device("cpu"), chunk_counts, not chunk_counts)
    )
    log, step = Log([], [], []), 0

    def times(recorder: object, schedule: Schedule) -> torch.Tensor:
        return rigged(SLOW_MLP if step < drifts_at else SLOW_ATTENTION, rank, schedule.chunks, window)

    with patch.object(planning, "measured", times):
        for step in range(steps):
            x = torch.randn(2, 8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
            if planner is not None:
                planner.begin_step(timed=True)
            log.ran.append((blocks[0].schedule.slot, blocks[0].moe.num_chunks))
            for block in blocks:
                x = block(x).y_BSD
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if planner is not None:
                planner.end_step()
                if planner.plans and planner.plans not in log.plans:
                    log.plans.append(planner.plans)
    log.weights.extend(p.detach() for b in blocks for p in b.parameters())
    return log


@pytest.mark.parametrize(("window", "faster"), [({1: 0.3, 2: 0.4}, 1), ({1: 0.4, 2: 0.3}, 2)])
def test_of_two_chunk_counts_both_are_measured_then_tried_and_the_faster_is_taken(window, faster):
    """Each with its best slot by its measured times; which is the faster, the trial alone decides."""
    steps = WARMUP_STEPS + 2 * (STEPS_EACH + TRIES_EACH)
    arguments = (Schedule("pos2", 3), (1, 2), steps + 2, 10**6, window)
    for log in run_ranks(planned_training, 2, *arguments):
        chunks = [1] * WARMUP_STEPS + [1, 2] * (STEPS_EACH + TRIES_EACH) + [faster] * 2
        assert [ran for _, ran in log.ran] == chunks
        ((shortcut, standard),) = log.plans
        assert list(shortcut.times) == list(standard.times) == [1, 2]
        best = {c: best_schedule(slots(Schedule("pos2", chunks=c)), shortcut.times) for c in (1, 2)}
        assert shortcut.schedule == best[faster] and standard.schedule == Schedule("top_k", chunks=faster)
        tried = log.ran[WARMUP_STEPS + 2 * STEPS_EACH : steps]
        assert tried == [(best[c].slot, c) for c in (1, 2)] * TRIES_EACH
        assert log.ran[steps] == (best[faster].slot, faster)


def same_chunks(rank: int, world_size: int, chunks: int) -> list[Log]:
    steps = WARMUP_STEPS + STEPS_EACH + 2
    own = Schedule("pos2", 3, chunks)
    return [planned_training(rank, world_size, own, counts, steps) for counts in (None, (chunks,), ())]


@pytest.mark.parametrize("chunks", [2, 4])
def test_a_fixed_number_of_chunks_is_kept_in_every_step_and_so_every_bit(chunks):
    for plain, auto, fixed in run_ranks(same_chunks, 2, chunks):
        assert {c for log in (plain, auto, fixed) for _, c in log.ran} == {chunks}
        assert auto.plans[0][0].schedule.slot != 3 and auto.plans[0][0].schedule.chunks == chunks
        assert fixed.plans[0][0].schedule == Schedule("pos2", 3, chunks)
        for log in (auto, fixed):
            assert all(torch.equal(w, e) for w, e in zip(log.weights, plain.weights, strict=True))


def test_times_that_drift_make_another_plan_on_all_ranks():
    first = WARMUP_STEPS + STEPS_EACH
    drifts_at = first + 2
    steps = drifts_at + DRIFTED_IN_TURN + first + 1
    ours, theirs = run_ranks(planned_training, 2, Schedule("pos2", 0), (1,), steps, drifts_at)
    (before, *_), (after, *_) = ours.plans
    assert ours.plans == theirs.plans and ours.ran == theirs.ran
    assert before.schedule == Schedule("pos2", 1) and ours.ran[first : drifts_at + DRIFTED_IN_TURN] == [(1, 1)] * 5
    assert after.schedule == Schedule("pos2", 2) and ours.ran[-1] == (2, 1)


@pytest.mark.parametrize("steps", [0, WARMUP_STEPS + 1, WARMUP_STEPS + STEPS_EACH + 1])
def test_a_closed_planner_leaves_nothing_on_the_blocks(steps):
    """Wherever training ends: in the warm-up, while transfers are waited for at once, or as planned."""
    for clean, schedule in run_ranks(closed, 2, steps):
        assert clean and schedule == Schedule("pos2", 1 if steps > WARMUP_STEPS + STEPS_EACH else 3)


def closed(rank: int, world_size: int, steps: int) -> tuple[bool, Schedule]:
    dist.init_process_group("gloo")
    blocks = build(rank, world_size)
    planner = Planner(blocks, None, torch.device("cpu"), (1,))
    with patch.object(planning, "measured", lambda recorder, schedule: rigged(SLOW_MLP, rank, 1)):
        for _ in range(steps):
            planner.begin_step(timed=True)
            planner.end_step()
        planner.begin_step(timed=True)
    planner.close()
    blocking = any(isinstance(block.moe.dispatcher, Blocking) for block in blocks)
    recording = any(m.recorder is not None for block in blocks for m in (block, block.moe))
    return not blocking and not recording, blocks[0].schedule


def disagree(rank: int, world_size: int) -> None:
    real = Planner.price_layer

    def price(self: Planner, layer: int, seconds: torch.Tensor) -> dict[int, Plan]:
        plans = real(self, layer, seconds)
        other = Schedule("top_k", chunks=2)
        return {1: replace(plans[1], schedule=other)} if rank == 1 and layer == 1 else plans

    with patch.object(planning.Planner, "price_layer", price):
        training(rank, world_size, "auto")


def test_ranks_that_plan_differently_are_stopped():
    with pytest.raises(RankError, match=r"rank 1 plans \(slot, chunks\) .*\[0, 2\]\], rank 0 .*\[0, 1\]\]"):
        run_ranks(disagree, 2)


def drift(rank: int, world_size: int) -> list[bool]:
    """Whether each timed step is followed by measuring anew."""
    dist.init_process_group("gloo")
    planner = Planner(build(rank, world_size), None, torch.device("cpu"), chunk_counts=(1,))
    planner.plans = [Plan(Schedule("pos2"), {1: OperatorTimes(dict.fromkeys(planning.OPERATORS, 1.0))}, (9.0, 9.0))] * 2
    planner.plans = [
        replace(p, times={1: OperatorTimes(p.times[1].forward, p.times[1].forward)}) for p in planner.plans
    ]
    restarted = []
    for seconds in (1.0, 1.1, 2.0, 0.9, 2.0, 2.0, 2.0):  # one slow step is noise, three in turn are not
        planner.steps = 1000
        sample = torch.zeros(2, 2, len(planning.OPERATORS) + 1, dtype=torch.float64)
        sample[..., -1] = seconds
        planner.note_overlap(sample)
        restarted.append(planner.steps == 0)
    return restarted


def test_times_that_stay_changed_are_measured_anew():
    assert DRIFTED_IN_TURN == 3
    for restarted in run_ranks(drift, 2):
        assert restarted == [False] * 6 + [True]


def test_a_plan_is_told_in_one_line_for_layers_alike():
    times = {1: OperatorTimes({"dispatch": 0.010, "combine": 0.010, "attention": 0.012, "experts": 0.001})}
    plan = Plan(Schedule("pos1", 1), times, (0.03, 0.0))
    lines = plan_lines([plan, plan, replace(plan, schedule=Schedule("pos1", 2))])
    assert len(lines) == 2
    assert lines[0].startswith(
        "plan: MoE layers 1 to 2: pos1, slot 1 of 0 to 2, 1 chunk(s): 23.0 ms there and back, 10.0"
    )
    assert "Eq. 11 would take slot" in lines[1]


def test_what_ran_says_how_much_communication_there_is_to_hide():
    times = {1: OperatorTimes({"dispatch": 0.010, "combine": 0.010, "attention": 0.012, "experts": 0.001})}
    times[1] = OperatorTimes(times[1].forward, times[1].forward)
    plan = Plan(Schedule("pos1", 1), times, (0.04, 0.04))
    line = what_ran([plan, plan], Overlap((0.05, 0.05), (0.75, 0.5)), "gloo")
    assert line.startswith("ran: gloo, slot 1 x 1 (slot x chunks): 100.0 ms of all MoE windows a step, predicted ")
    assert line.endswith("50 % of the time without overlap, hidden: 75 % forward, 50 % backward")
