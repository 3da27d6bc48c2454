"""These tests check the dispatcher and its transfers alone, on ranks: what arrives, what comes
back, and when.

Every rank can make the rows of every rank, so each knows what it must receive and what gradient
must come back. Rows are only moved, and no sum changes its order: results must be bit-identical.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from experiments.engine.ranks import run_ranks
from scmoe.parallel.wire.all_to_all import (
    AllToAllDispatcher,
    Posted,
    Transfer,
    all_to_all,
    point_to_point,
)

pytestmark = pytest.mark.ranks

DIM, LOCAL_EXPERTS = 3, 2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven_counts(world_size: int, num_experts: int) -> Tensor:
    """Return the number of rows by [rank, expert]. Some are 0, among them all of rank 0 and all of
    the last expert."""
    counts = torch.randint(
        0, 4, (world_size, num_experts), generator=torch.Generator().manual_seed(world_size)
    )
    counts[0], counts[:, -1] = 0, 0
    counts[1, 0] = 5
    assert (counts[1:, :-1] == 0).any()
    return counts


def dispatch_and_combine(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    uneven = uneven_counts(world_size, world_size * LOCAL_EXPERTS)
    for counts in (uneven, torch.zeros_like(uneven)):
        multiply_rows(rank, counts, equal=False)
    multiply_rows(rank, torch.full_like(uneven, 3), equal=True)


def multiply_rows(rank: int, counts: Tensor, equal: bool) -> None:
    """Each expert multiplies by its own vector, so a row in the wrong place shows in forward and in
    backward.

    counts: rows by [rank, expert]. equal: the dispatcher may rely on equal numbers."""
    world_size, num_experts = counts.shape
    rows = [random(int(counts[s].sum()), DIM, seed=s) for s in range(world_size)]
    vectors_ED = random(num_experts, DIM, seed=200)
    here = range(rank * LOCAL_EXPERTS, (rank + 1) * LOCAL_EXPERTS)

    mine, local_eD = rows[rank].clone().requires_grad_(), vectors_ED[here].clone().requires_grad_()
    dispatcher = AllToAllDispatcher(None, num_experts)
    announced = None if equal else dispatcher.announce(counts[rank][None]).wait()[0]
    pending, receipt = dispatcher.dispatch(mine, announced)
    received = pending.wait()
    by_expert = [[rows[s].split(counts[s].tolist())[e] for s in range(world_size)] for e in here]
    assert torch.equal(received, torch.cat([torch.cat(senders) for senders in by_expert])), (
        "order: expert, sender"
    )
    with pytest.raises(AssertionError, match="awaited once"):
        pending.wait()
    if equal:
        assert receipt.num_tokens_per_expert_e is None
    else:
        assert receipt.num_tokens_per_expert_e.tolist() == counts[:, here].sum(0).tolist()

    per_row = local_eD.repeat_interleave(counts[:, here].sum(0), dim=0)
    back = dispatcher.combine(received * per_row, receipt).wait()
    mine_of_ED = vectors_ED.repeat_interleave(counts[rank], dim=0)
    assert torch.equal(back, rows[rank] * mine_of_ED), "combine undoes dispatch"

    factor = random(*mine.shape, seed=300 + rank)
    (back * factor).sum().backward()
    assert torch.equal(mine.grad, factor * mine_of_ED)
    products = [random(*rows[s].shape, seed=300 + s) * rows[s] for s in range(world_size)]
    blocks = [products[s].split(counts[s].tolist()) for s in range(world_size)]
    expected = torch.stack([torch.cat([senders[e] for senders in blocks]).sum(0) for e in here])
    assert torch.allclose(local_eD.grad, expected, rtol=1e-5, atol=1e-5), (
        "a sum of up to 17 float32 terms"
    )


def test_combine_undoes_dispatch():
    run_ranks(dispatch_and_combine, 4)


# ---------------------------------------------------------------------- when

WORK_S = 0.02  # long enough that the order of events does not depend on chance


class Work(Function):
    """This computation runs in parallel with the transfer. It takes WORK_S in forward and in
    backward."""

    @staticmethod
    def forward(ctx, x: Tensor, log: list[tuple[str, float]]) -> Tensor:
        ctx.log = log
        Work.compute(log)
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor):
        Work.compute(ctx.log)
        return 2 * grad, None

    @staticmethod
    def compute(log: list[tuple[str, float]]) -> None:
        log.append(("work begins", time.perf_counter()))
        time.sleep(WORK_S)
        log.append(("work ends", time.perf_counter()))


class LoggedWork:
    """This running transfer logs when its caller waits for it."""

    def __init__(self, work: dist.Work, log: list[tuple[str, float]]) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        self.log.append(("finish", time.perf_counter()))
        self.work.wait()


def logged(start: Any, log: list[tuple[str, float]]) -> Any:
    def call(*args: Any, **kwargs: Any) -> LoggedWork:
        log.append(("launch", time.perf_counter()))
        return LoggedWork(start(*args, **kwargs), log)

    return call


def with_and_without_overlap(
    rank: int, world_size: int
) -> list[dict[str, list[tuple[str, float]]]]:
    dist.init_process_group("gloo")
    return [time_stamps(overlap) for overlap in (True, False)]


def time_stamps(overlap: bool) -> dict[str, list[tuple[str, float]]]:
    """Return the events of a forward and a backward pass: start, work, wait, or without overlap
    start, wait, work."""
    log: list[tuple[str, float]] = []
    rows, other = (torch.ones(4, DIM, requires_grad=True) for _ in range(2))
    with patch("scmoe.parallel.wire.all_to_all.point_to_point", logged(point_to_point, log)):
        transfer = Transfer(all_to_all(None)).start(rows)
        if overlap:
            worked = Work.apply(other, log)
            received = transfer.wait()
        else:
            received = transfer.wait()
            worked = Work.apply(other, log)
        loss = (received * worked).sum()
        forward, log[:] = list(log), []
        loss.backward()
    assert torch.equal(rows.grad, torch.full_like(rows, 2.0))
    assert torch.equal(other.grad, torch.full_like(other, 2.0))
    return {"forward": forward, "backward": list(log)}


def test_a_transfer_hides_behind_the_work_forward_and_backward():
    """In backward, the gradient's transfer is launched before the backward of the work and awaited
    after it. Without work in between nothing is hidden."""
    for overlapped, sequential in run_ranks(with_and_without_overlap, 2):
        for way in ("forward", "backward"):
            assert [name for name, _ in overlapped[way]] == [
                "launch",
                "work begins",
                "work ends",
                "finish",
            ], way
            times = dict(overlapped[way])
            assert times["finish"] - times["launch"] >= WORK_S, way
        assert [name for name, _ in sequential["forward"]] == [
            "launch",
            "finish",
            "work begins",
            "work ends",
        ]
        assert [name for name, _ in sequential["backward"]] == [
            "work begins",
            "work ends",
            "launch",
            "finish",
        ]


class Lost:
    def wait(self) -> None:
        raise RuntimeError("peer is gone")


def test_an_error_of_rows_reaches_both_that_wait_for_them():
    """The thread of a recorder waits for rows too, and backward must not go on without them."""
    posted: Future[list[Any]] = Future()
    posted.set_result([Lost()])
    rows = Posted(posted)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="peer is gone"):
            rows.wait()


def differentiated_twice(rank: int, world_size: int) -> str:
    dist.init_process_group("gloo")
    dispatcher = AllToAllDispatcher(dist.group.WORLD, world_size)
    x = torch.ones(2 * world_size, DIM, requires_grad=True)
    pending, receipt = dispatcher.dispatch(x, None)
    y = x + dispatcher.combine(pending.wait() ** 3, receipt).wait()
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as caught:
        grad.sum().backward()
    return str(caught.value)


def test_a_second_derivative_through_a_transfer_is_an_error():
    """Without it the part of the experts would be left out in silence."""
    assert all("once_differentiable" in said for said in run_ranks(differentiated_twice, 2))


def test_rows_on_a_gpu_are_refused_by_a_group_of_gloo():
    with patch.object(dist, "get_backend", return_value="gloo"):
        exchange = all_to_all(None)
    rows: Any = SimpleNamespace(is_cuda=True)
    with pytest.raises(ValueError, match="backend is gloo, allowed for rows on a GPU: nccl"):
        exchange(rows, None)
