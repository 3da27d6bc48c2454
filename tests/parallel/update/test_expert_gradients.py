"""Gradients of experts are averaged once a step, also of experts that are frozen for a time.

test_wrap.py compares them with those of one process.
"""

from __future__ import annotations

from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from experiments.engine.ranks import run_ranks
from scmoe.api import MoE
from scmoe.parallel.mesh import Mesh, build_mesh, expert_parameters
from scmoe.parallel.update.expert_gradients import ExpertGradientReducer
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire.wire import Wire
from tests.support.trainings import tiny, train

pytestmark = pytest.mark.ranks


def count_expert_reductions(rank: int, world_size: int) -> int:
    text = "position=pos2 strategy.ep_size=1 trainer.max_steps=2 trainer.accumulate=2"
    launch = ExpertGradientReducer._launch
    with patch.object(
        ExpertGradientReducer, "_launch", autospec=True, side_effect=launch
    ) as counted:
        train(tiny(text, world_size))
    return counted.call_count


def test_expert_gradients_are_sent_once_a_step():
    """Only a count shows this: sending them after every batch would give the same numbers, as a
    mean of means."""
    assert run_ranks(count_expert_reductions, 2) == [2, 2]


# -------------------------------------------------- experts that are frozen for a time


def with_frozen(rank: int, world_size: int) -> dict[tuple[int, bool], list[torch.Tensor | None]]:
    """Return this rank's expert gradients of two modules, by EP degree and whether they were
    frozen at first: of a step in which the first module's experts stay frozen, and of a step in
    which they do not."""
    dist.init_process_group("gloo")
    found = {}
    for ep_size in (1, 2):
        mesh = build_mesh(ep_size, torch.device("cpu"), timedelta(seconds=60))
        for frozen in (False, True):
            torch.manual_seed(1)
            module = torch.nn.ModuleList(MoE(16, 4, ffn_dim=32, group=Wire(mesh)) for _ in range(2))
            module[0].experts.requires_grad_(not frozen)
            shards = [p for _, p in expert_parameters(module)]
            reducer = ExpertGradientReducer(shards, mesh)
            of_steps: list[torch.Tensor | None] = []
            for _ in range(2):
                x = torch.randn(8, 16, generator=torch.Generator().manual_seed(rank))
                sum(moe(x)[0].square().mean() for moe in module).backward()
                of_steps += [None if p.grad is None else p.grad.clone() for p in shards]
                assert not getattr(reducer, "launched", []), "a second copy of all gradients"
                module.requires_grad_().zero_grad()
            found[ep_size, frozen] = of_steps
    return found


def test_experts_that_are_unfrozen_during_training_have_the_gradients_of_others():
    mine, theirs = run_ranks(with_frozen, 2)
    for rank in (mine, theirs):
        for ep_size in (1, 2):
            always, unfrozen = rank[ep_size, False], rank[ep_size, True]
            assert unfrozen[:2] == [None, None]
            assert all(map(torch.equal, always[2:], unfrozen[2:])), f"EP {ep_size}"
    assert all(map(torch.equal, mine[1, True][2:], theirs[1, True][2:]))
    assert not any(map(torch.equal, mine[2, True][2:], theirs[2, True][2:]))


def test_a_rank_with_all_experts_does_not_copy_their_gradients():
    p = torch.nn.Parameter(torch.ones(3))
    with patch.object(ExpertGradientReducer, "_scale") as copied:
        ExpertGradientReducer([p], Mesh())
        p.sum().backward()
    assert not copied.called and p.grad is not None and p.grad.eq(1).all()


def with_unused(rank: int, world_size: int) -> list[list[bool]]:
    """Return which expert gradients of two modules there are after a loss of the first module, and
    after one in which only rank 0 uses the second."""
    dist.init_process_group("gloo")
    mesh = build_mesh(1, torch.device("cpu"), timedelta(seconds=60))
    torch.manual_seed(1)
    first, second = (MoE(16, 4, ffn_dim=32, group=Wire(mesh)) for _ in range(2))
    shards = [p for moe in (first, second) for _, p in expert_parameters(moe)]
    ExpertGradientReducer(shards, mesh)
    found = []
    for used in (False, rank == 0):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(rank))
        y = first(x)[0]
        (second(y)[0] if used else y).square().mean().backward()
        found.append([p.grad is not None for p in shards])
        for p in shards:
            p.grad = None
    return found


def test_experts_that_no_rank_has_used_have_no_gradient():
    """An optimizer would move them by a gradient of zeros: weight decay and momentum."""
    assert run_ranks(with_unused, 2) == [[[True, True, False, False], [True] * 4]] * 2


class Skipping(torch.nn.Module):
    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(16, 16)
        self.moe = MoE(16, 4, ffn_dim=32, group=wire)

    def forward(self, x: torch.Tensor, skip: bool) -> torch.Tensor:
        x = self.dense(x)
        return x if skip else self.moe(x)[0]


def of_a_step_that_ends_without_experts(rank: int, world_size: int) -> list[torch.Tensor]:
    """Return this rank's gradients of all experts after two batches, of which the second skips
    them."""
    dist.init_process_group("gloo")
    mesh = build_mesh(1, torch.device("cpu"), timedelta(seconds=60))
    torch.manual_seed(1)
    model = Skipping(Wire(mesh))
    wrapped = wrap(model, mesh, find_unused_parameters=True)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(rank))
    with wrapped.no_sync():
        wrapped.backward(wrapped.module(x, False).square().mean())
    wrapped.backward(wrapped.module(x, True).square().mean())
    return [p.grad.clone() for _, p in expert_parameters(model) if p.grad is not None]


def test_the_last_batch_of_a_step_sends_what_earlier_ones_have_left():
    """DDP does so for dense weights. Else copies of experts are moved by other gradients."""
    mine, theirs = run_ranks(of_a_step_that_ends_without_experts, 2)
    assert len(mine) == 2 and all(map(torch.equal, mine, theirs))
