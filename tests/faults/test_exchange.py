"""Two hops with a rank that does not take part."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from experiments.engine.ranks import run_ranks
from scmoe.parallel.mesh import build_context

pytestmark = [pytest.mark.dist, pytest.mark.faults, pytest.mark.representative]
TIMEOUT_S = 5.0  # also of the set-up of the groups, in which a busy machine may take seconds


def absent(rank: int, world_size: int) -> float:
    """Rank 3 takes no part. Returns how long this rank waited for it, until it got an error."""
    dist.init_process_group("gloo")
    context = build_context(4, torch.device("cpu"), timedelta(seconds=TIMEOUT_S), "hierarchical", 2)
    start = time.monotonic()
    if rank == 3:
        time.sleep(TIMEOUT_S + 1)
    else:
        with pytest.raises(RuntimeError):
            context.exchange(torch.ones(4, 2), None)[1].wait()
    return time.monotonic() - start


def test_a_rank_that_is_absent_ends_the_wait_of_both_hops():
    """Rank 2 waits for its first hop, and ranks 0 and 1 for their second hops from ranks 2 and 3."""
    assert max(run_ranks(absent, 4, nodes=2)) < 60, "gloo's own timeout is half an hour"
