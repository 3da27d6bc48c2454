"""What the ranks of a job agree on.

A poll gives every rank the yes of one rank, uneven batches are refused before the first batch, and
a data worker that fails is named.
"""

from __future__ import annotations

import os
import re
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from experiments.engine.ranks import run_ranks
from scmoe.datamodules import sequences
from scmoe.lightning.job import Poll, check_even, meeting
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.mesh import Mesh
from scmoe.training.assembly.data import build_datamodule
from tests.support.failing import MODEL, failure
from tests.support.lightning_net import Net
from tests.support.lightning_net import loader as batches
from tests.support.trainings import fit, tiny, users_trainer

pytestmark = pytest.mark.ranks


def ask(rank: int, world_size: int) -> list[list[bool]]:
    """Rank 1 says yes to the first question at the second call, and never to the other question."""
    dist.init_process_group("gloo")
    poll = Poll(dist.group.WORLD)
    answers = [poll.any_rank(rank == 1 and call == 1, False) for call in range(4)]
    return [*answers, poll.close()]


def test_all_ranks_get_the_yes_of_one_rank():
    for answers in run_ranks(ask, 3):
        assert [first for first, _ in answers] == [False, False, True, False, False]
        assert not any(second for _, second in answers)


def test_a_port_that_another_process_uses_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(OSError, match=f"another process uses MASTER_PORT.*{port}"),
            meeting(timedelta(seconds=5)),
        ):
            dist.TCPStore("localhost", port, is_master=True)


# ---------------------------------------------------------------------- uneven batches


def shorten(rank: int, world_size: int, loader: str, how: str = "") -> None:
    config = tiny(f"{MODEL} trainer.val_every=2 {how}", world_size)
    data = build_datamodule(config)
    whole = getattr(data, loader)

    def short() -> Any:
        batches = list(whole())
        return DataLoader(batches[: len(batches) - (rank == 1)], batch_size=None)

    setattr(data, loader, short)
    fit(config, data=data)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("loader", "how"),
    [
        pytest.param("train", "", marks=pytest.mark.representative),
        ("val", ""),
        pytest.param(
            "val", "strategy.ep_size=1 strategy.dense=sharded", marks=pytest.mark.representative
        ),
    ],
)
def test_uneven_batches_are_refused_before_the_first(loader, how):
    """The refusal comes at once, not minutes later from the timeout of a collective."""
    message = failure(shorten, 2, f"{loader}_dataloader", how, all_fail=True)
    counts = r"rank 0: (\d+); rank 1: (\d+)"
    found = re.search(
        rf"ValueError: ranks have different numbers of {loader} batches \({counts}\)", message
    )
    assert found and int(found[1]) == int(found[2]) + 1, message
    # the same on both ranks
    assert re.search(r"rank [01], later: ValueError: ranks have different numbers", message)


def count_batches(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    mesh = Mesh(rank, world_size, control_group=dist.new_group(backend="gloo"))
    check_even("val", [3, float("inf")], mesh)  # equal on both ranks; inf: the length is unknown
    check_even("val", [3, 4 + rank], mesh)


@pytest.mark.faults
def test_each_loader_is_counted():
    message = failure(count_batches, 2)
    assert "different numbers of val batches (rank 0: 3 + 4; rank 1: 3 + 5)" in message


# ---------------------------------------------------------------------- a data worker dies


def break_worker(rank: int, world_size: int, how: str) -> None:
    config = tiny(f"{MODEL} trainer.max_steps=2 data.workers=1 strategy.timeout_s=10", world_size)
    data = build_datamodule(config)
    data.setup()
    (_, second), whole = data.train_dataloader().batch_sampler, sequences.TrainSequences.__getitem__
    fatal = second[1]

    def broken(
        self: Any, i: int
    ) -> Any:  # runs only in a worker: this process reads no sample itself
        if i == fatal and how == "dies":
            os._exit(1)
        if i == fatal:
            raise RuntimeError("no such file")
        return whole(self, i)

    if rank == 1:
        sequences.TrainSequences.__getitem__ = broken
    try:
        fit(config, data=data)
    except RuntimeError as error:
        error.add_note(f"expected: {fatal}")
        raise


@pytest.mark.faults
@pytest.mark.parametrize(
    "how, says", [("dies", "worker .* exited unexpectedly"), ("raises", "no such file")]
)
def test_a_data_worker_that_fails_is_named_with_its_sample(how, says):
    message = failure(break_worker, 2, how)
    assert message.startswith("rank 1 of 2 failed first:")
    assert re.search(says, message)
    note = r"data worker 0 \(pid \d+\) was reading sample (\d+) of TrainSequences\n.*expected: \1\n"
    assert re.search(note, message), message


class Reloading(Net):
    def train_dataloader(self) -> Any:
        shorter = 4 * (self.current_epoch == 1 and self.global_rank == 1)
        return batches(16 - shorter, batch_size=2)


def reload(rank: int, world_size: int) -> None:
    strategy = ExpertParallelStrategy(timeout_s=20)
    how = {"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False}
    users_trainer(world_size, strategy, max_epochs=3, **how).fit(Reloading())


def test_uneven_batches_of_a_later_epoch_are_refused_before_its_first():
    message = failure(reload, 2, all_fail=True)
    assert "different numbers of train batches (rank 0: 8; rank 1: 6)" in message
