"""A question asked of all ranks has one answer, one call later, whoever said yes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from scmoe.parallel.job.lockstep import Poll
from scmoe.testbed.ranks import run_ranks

pytestmark = pytest.mark.dist


def ask(rank: int, world_size: int) -> list[list[bool]]:
    """Rank 1 says yes to the first question at the second call, to the other never."""
    dist.init_process_group("gloo")
    poll = Poll(dist.group.WORLD, num_flags=2)
    answers = [poll.any_rank(rank == 1 and call == 1, False) for call in range(4)]
    return [*answers, poll.close()]


def test_one_rank_speaks_for_all():
    for answers in run_ranks(ask, 3):
        assert [first for first, _ in answers] == [False, False, True, False, False]
        assert not any(second for _, second in answers)
