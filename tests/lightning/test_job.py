"""If any rank says yes in a poll, all ranks get the answer yes one call later."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from experiments.engine.ranks import run_ranks
from scmoe.lightning.job import Poll

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
