"""How the process groups are made on GPUs: in one order, with the Strategy's timeout, transfers
urgent, and started.

There is no NCCL here, so the calls are recorded.
"""

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from experiments.engine.ranks import run_ranks
from scmoe.api import wire_of
from scmoe.parallel import mesh

TIMEOUT = timedelta(seconds=77)


def groups_of(
    rank: int, world_size: int, ep_size: int, device: str, backends: str = "cpu:gloo,cuda:nccl"
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the groups that a rank makes, and in whose order it starts them."""
    made: list[dict[str, Any]] = []
    started: list[str] = []

    def subgroups(ranks: list[list[int]], **given: Any) -> tuple[str, None]:
        made.append({"ranks": ranks, **given})
        return given["group_desc"], None

    def group(**given: Any) -> str:
        made.append(given)
        return given["group_desc"]

    options = SimpleNamespace(Options=SimpleNamespace)
    with (
        patch.object(dist, "get_rank", return_value=rank),
        patch.object(dist, "get_world_size", return_value=world_size),
        patch.object(dist, "get_backend_config", return_value=backends),
        patch.object(dist, "new_subgroups_by_enumeration", subgroups),
        patch.object(dist, "new_group", group),
        patch.object(dist, "ProcessGroupNCCL", options, create=True),
        patch.object(dist, "all_reduce", lambda tensor, group: started.append(group)),
        patch.object(torch, "zeros", lambda *_, **__: None),
        patch.object(torch.cuda, "synchronize", lambda _: started.append("wait")),
        patch.object(mesh.DeviceMesh, "from_group", return_value=None),
    ):
        mesh.build_mesh(ep_size, torch.device(device), TIMEOUT)
    return made, started


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_group_has_the_timeout_and_only_transfers_are_urgent(device):
    made, started = groups_of(1, 8, 4, device)
    assert device == "cuda" or not started, "gloo needs no start"
    assert all(given["timeout"] == TIMEOUT for given in made)
    urgent = {given["group_desc"]: given.get("pg_options") for given in made}
    of_transfers = [urgent.pop(name) for name in ("ep", "counts")]
    # torch warns of options with another timeout than the group's
    options = SimpleNamespace(is_high_priority_stream=True, _timeout=TIMEOUT)
    assert of_transfers == [options if device == "cuda" else None] * 2
    assert urgent == dict.fromkeys(("edp", "checkpoint", "control"))


def test_the_rows_of_gpus_do_not_travel_over_gloo():
    with pytest.raises(ValueError, match=r"ep_size is 4 .*allowed: 1"):
        groups_of(1, 8, 4, "cuda", "cpu:gloo,cuda:gloo")
    groups_of(1, 8, 1, "cuda", "cpu:gloo,cuda:gloo")
    groups_of(1, 8, 4, "cpu", "cpu:gloo,cuda:gloo")


def test_all_ranks_make_and_start_their_groups_in_one_order():
    """A communicator of NCCL is a collective of its group's ranks, so other orders on other ranks
    would hang."""
    first, *others = [groups_of(rank, 8, 4, "cuda") for rank in range(8)]
    assert first[1] == [None, "ep", "counts", "edp", "wait"]
    assert others == [first] * 7


@pytest.mark.parametrize(
    ("cuda", "chosen", "used"),
    [("13.0", None, "1"), ("13.0", "0", "0"), (None, None, None)],
    ids=str,
)
def test_nccl_starts_kernels_in_the_order_of_their_launch_unless_the_user_has_chosen(
    cuda, chosen, used, monkeypatch
):
    name = "NCCL_LAUNCH_ORDER_IMPLICIT"
    monkeypatch.setenv(name, chosen or "")  # so that it is restored
    if chosen is None:
        del os.environ[name]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    mesh.order_launches_of_nccl()
    assert os.environ.get(name) == used


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, []),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_LAUNCH_BLOCKING": "0"}, []),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, ["CUDA_DEVICE_MAX_CONNECTIONS"]),
        (
            {"CUDA_LAUNCH_BLOCKING": "1", "TORCH_NCCL_BLOCKING_WAIT": "1"},
            ["CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT"],
        ),
    ],
)
def test_variables_with_which_a_gpu_hides_less_are_named(variables, named, monkeypatch):
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [line.split()[0] for line in mesh.what_prevents_overlap()] == named


# ---------------------------------------------------------------------- the wire


def sum_in_groups_of_two(rank: int, world_size: int) -> float:
    dist.init_process_group("gloo")
    groups = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    return wire_of(groups[rank // 2]).mesh.sum_over_ranks(torch.tensor(1.0 + rank)).item()


@pytest.mark.ranks
def test_a_sum_over_ranks_is_that_of_the_meshs_own_ranks():
    assert run_ranks(sum_in_groups_of_two, 4) == [3.0, 3.0, 7.0, 7.0]
