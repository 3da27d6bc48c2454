"""The suite detects that something is missing: a scale, a list, a wait, a rank.

Each control breaks one thing inside the ranks and makes the comparison of test_ep_equality.py. The
comparison must then fail by at least 1e-6, a million times the allowed difference. Transfers that
are late, or overtake each other, must change no bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.engine.ranks import RankError, run_ranks
from scmoe.parallel.dense import sharded
from scmoe.parallel.update import wrap
from scmoe.parallel.update.expert_gradients import ExpertGradientReducer
from scmoe.parallel.wire import all_to_all
from scmoe.parallel.wire.all_to_all import Transfer
from tests.support.cases import EP2
from tests.support.comparison import TOLERANCE, assemble, assert_same, assert_same_bits, difference
from tests.support.trainings import tiny, train, train_cases
from tests.support.transfers import Late, Shuffled, delayed

pytestmark = pytest.mark.ranks

MODEL = "architecture=scmoe position=pos2 top_k=2 schedule.chunks=2"
SHOWS = 1e-6

# -------------------------------------------------- trainings with one thing broken


def finish_without_waiting(backward: bool) -> Callable[[Transfer], None]:
    """Return a Transfer.finish that does not wait in one direction. A transfer has a gradient only
    in backward."""
    real = Transfer.finish

    def finish(transfer: Transfer) -> None:
        if (getattr(transfer, "grad", None) is not None) == backward:
            # the rows are here but are not read; without this wait, peers would run ahead
            transfer.work.work.wait()
            transfer.work = transfer.source = None
        else:
            real(transfer)

    return finish


BROKEN: dict[str, Callable[[], list[Any]]] = {
    "nothing": lambda: [],
    "late": lambda: [patch.object(all_to_all, "point_to_point", delayed(Late))],
    "shuffled": lambda: [patch.object(all_to_all, "point_to_point", delayed(Shuffled))],
    "no 1/EP scale": lambda: [
        patch.object(ExpertGradientReducer, "_scale", lambda self, grad: grad)
    ],
    "no DDP ignore list": lambda: [
        patch.object(caller, "hide_from_ddp", lambda module, names: None)
        for caller in (sharded, wrap)
    ],
    "no wait, forward": lambda: [
        patch.object(all_to_all, "point_to_point", delayed(Late)),
        patch.object(Transfer, "finish", finish_without_waiting(backward=False)),
    ],
    "no wait, backward": lambda: [
        patch.object(all_to_all, "point_to_point", delayed(Late)),
        patch.object(Transfer, "finish", finish_without_waiting(backward=True)),
    ],
}


def train_broken(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Return a record for each broken thing."""
    records = {}
    for name, patches in BROKEN.items():
        with ExitStack() as stack:
            for p in patches():
                stack.enter_context(p)
            records[name] = train(tiny(f"{MODEL} {EP2}", world_size))
    return records


@pytest.fixture(scope="module")
def one() -> dict[str, list[Tensor]]:
    (records,) = run_ranks(train_cases, 1, {"model": MODEL})
    return assemble([records["model"]])


@pytest.fixture(scope="module")
def broken() -> dict[str, list[dict[str, Any]]]:
    ranks = run_ranks(train_broken, 2)
    return {name: [records[name] for records in ranks] for name in BROKEN}


def test_with_nothing_broken_two_ranks_equal_one(one, broken):
    assert_same(broken["nothing"], one)


@pytest.mark.parametrize("name", ["late", "shuffled"])
def test_late_transfers_change_no_bit(name, broken):
    assert_same_bits(broken[name], broken["nothing"])


@pytest.mark.parametrize(
    "name", ["no 1/EP scale", "no DDP ignore list", "no wait, forward", "no wait, backward"]
)
def test_a_broken_part_shows(name, one, broken):
    """Without its ignore list DDP gives every rank the experts of rank 0, so shards are equal that
    must differ."""
    error, _ = difference(assemble(broken[name]), one)
    assert error > SHOWS > TOLERANCE


# ---------------------------------------------------------------------- ranks that fail


def misbehave(rank: int, world_size: int, how: str) -> int:
    dist.init_process_group("gloo")
    if rank == 1:
        if how == "raise":
            raise KeyError("the reason")
        if how == "vanish":
            os._exit(0)
        if how == "hang":
            time.sleep(600)
    dist.all_reduce(torch.ones(1))
    return os.getpid()


@pytest.mark.parametrize(
    "how, says",
    [
        ("raise", r"^rank 1 of 3 failed first:\nTraceback[\s\S]*KeyError: 'the reason'"),
        ("vanish", r"^rank 1 of 3 failed first:\nthe process ended without a report"),
        ("hang", r"^no result within 2 s from rank 0, 1, 2$"),
    ],
)
def test_a_failing_rank_is_named_and_all_end_soon(how, says):
    with pytest.raises(
        RankError, match=says
    ):  # before 60 s: after that the message would be "no result"
        run_ranks(misbehave, 3, how, timeout_s=2 if how == "hang" else 60)


def test_no_process_is_left():
    pids = run_ranks(misbehave, 3, "behave")
    assert len(set(pids)) == 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
