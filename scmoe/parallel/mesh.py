"""Who is where: ranks, process groups and the device mesh of expert parallelism.

Ranks form a grid ("edp", "ep"), EP innermost, rank = edp EP + ep, so that an EP group lies within a node where it
fits. Experts are split over `ep` and replicated over `edp` (expert data parallel); dense weights are replicated over
all ranks. One process group per purpose: collectives of two purposes never meet in one communicator.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from scmoe.moe.dispatcher import Dispatcher, LocalDispatcher
from scmoe.parallel.dispatcher import AllToAllDispatcher


@dataclass(frozen=True)
class ParallelContext:
    """A rank's place in the mesh. The default is one process that holds everything.

    `ep_group` carries the All-to-All, `edp_group` the expert gradients, `checkpoint_group` (gloo) checkpoints,
    `control_group` (gloo) requests to stop; the default group carries dense gradients, losses and metrics.
    """

    rank: int = 0
    world_size: int = 1
    ep_size: int = 1
    mesh: DeviceMesh | None = None
    ep_group: Any = None
    edp_group: Any = None
    checkpoint_group: Any = None
    control_group: Any = None

    @property
    def edp_size(self) -> int:
        return self.world_size // self.ep_size

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    def local_experts(self, num_experts: int) -> range:
        """Ids of the experts that this rank holds."""
        if num_experts % self.ep_size:
            raise ValueError(f"num_experts is {num_experts}, allowed: multiples of ep_size ({self.ep_size})")
        share = num_experts // self.ep_size
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)

    def dispatcher(self, num_experts: int, ceiling: float | None = None) -> Dispatcher:
        """How one MoE module's rows reach its experts: by All-to-All over the EP group, or not at all (one rank
        receives its fair share exactly, so no ceiling is passed)."""
        return LocalDispatcher() if self.ep_size == 1 else AllToAllDispatcher(self.ep_group, num_experts, ceiling)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same to the bit on each. x is left as it was."""
        if self.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total


def build_context(ep_size: int, device: torch.device, timeout: timedelta) -> ParallelContext:
    """Makes the groups; every rank of the default group must call it.

    The groups are made one by one: `new_group` does not inherit the default group's timeout, and a mesh built by
    `init_device_mesh` would use the default group itself for a dimension that spans all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % ep_size:
        raise ValueError(f"ep_size is {ep_size}, allowed: divisors of the number of ranks ({world_size})")
    grid = torch.arange(world_size).view(-1, ep_size)
    ep_group = _own_group(grid.tolist(), "ep", timeout, high_priority=device.type == "cuda")
    edp_group = _own_group(grid.T.tolist(), "edp", timeout)
    checkpoint_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint")
    control_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
    mesh = DeviceMesh.from_group([edp_group, ep_group], device.type, mesh=grid, mesh_dim_names=("edp", "ep"))
    return ParallelContext(rank, world_size, ep_size, mesh, ep_group, edp_group, checkpoint_group, control_group)


def _own_group(rows: list[list[int]], purpose: str, timeout: timedelta, high_priority: bool = False) -> Any:
    """All ranks make all groups, in the same order; returns the one that this rank is in."""
    own = None
    for ranks in rows:
        options = None
        if (
            high_priority
        ):  # the transfers' kernels go before the computation's: they are short, and others wait for them
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        group = dist.new_group(ranks, timeout=timeout, pg_options=options, group_desc=purpose)
        if dist.get_rank() in ranks:
            own = group
    return own


def use_loopback_for_gloo() -> None:
    """Ranks of one machine talk over loopback, unless the user has named an interface: gloo would ask the host name's
    address, which many laptops and containers cannot reach."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
