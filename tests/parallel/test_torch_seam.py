"""torch's default timeout is set without a warning."""

import warnings
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from experiments.engine.ranks import run_ranks
from scmoe.parallel.torch_seam import set_default_timeout


def timeout_of_a_group(rank: int, world_size: int) -> timedelta:
    """Return the limit of the default group after it was set, with warnings as errors."""
    distributed_c10d.init_process_group("gloo")
    with warnings.catch_warnings(action="error"):
        set_default_timeout(timedelta(seconds=37))
    gloo = distributed_c10d.group.WORLD._get_backend(torch.device("cpu"))
    return gloo.options._timeout


def test_the_default_timeout_is_set_by_a_name_that_does_not_warn():
    """torch 2.15 has a public name for it, and its private name warns there."""
    assert run_ranks(timeout_of_a_group, 1) == [timedelta(seconds=37)]
