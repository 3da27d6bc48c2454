"""No rank waits in one collective for the long work of another."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint.durable import BrokenCheckpoint, MissingCheckpoint
from scmoe.parallel.checkpoint.together import reading, together
from tests.support.faults import tiny_run

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


def work_together(rank: int, world_size: int, folder: Path) -> tuple[int, str]:
    """Let rank 1 work long and fail. Return the number of collectives meanwhile, and what is
    raised."""
    mesh, all_reduce, asked = (
        tiny_run.one_step(world_size, folder).strategy.mesh,
        dist.all_reduce,
        [],
    )

    def work() -> None:
        if rank == 1:
            time.sleep(2.2)
            raise OSError("of rank 1")

    with patch.object(
        dist, "all_reduce", lambda *args, **kw: asked.append(1) or all_reduce(*args, **kw)
    ):
        try:
            together(mesh, work)
        except OSError as error:
            return len(asked), str(error)
    return len(asked), ""


@pytest.mark.representative
def test_no_rank_waits_in_one_collective_for_the_long_work_of_another(tmp_path):
    """Reading a checkpoint may take longer than strategy.timeout_s."""
    for asked, said in run_ranks(work_together, 2, tmp_path):
        assert asked >= 3 and said == "of rank 1"


@pytest.mark.representative
def test_a_checkpoint_is_gone_or_whole_where_a_load_fails(tmp_path):
    """A rank without memory does not make it a broken one, which a resumption would set aside."""
    failure = dcp.CheckpointException("read", {1: (MemoryError("no memory"), None)})
    there, gone = tmp_path, tmp_path / "gone"
    with pytest.raises(OSError, match="rank 1: MemoryError") as raised, reading(there):
        raise failure
    assert not isinstance(raised.value, BrokenCheckpoint)
    with pytest.raises(MissingCheckpoint), reading(gone):
        raise failure
