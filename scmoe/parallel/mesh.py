"""The place of a rank in expert parallelism: sizes, process groups, DeviceMeshes.

Ranks form a grid ("edp", "ep"), EP innermost: rank = edp * EP + ep, so that an EP group lies within
a node if it fits. Experts are split over `ep` and replicated over `edp` (expert data parallel);
dense weights are replicated over all ranks. Each kind of traffic has its own process group, so that
its collectives never wait for those of another kind; what ranks ask each other on the host (whether
to stop, how many batches are left, which rank had a NaN) shares the control group.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmoe.moe.experts import Experts
from scmoe.parallel.torch_seam import urgent

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # which gloo reads when a group is made
# what `with_kept_groups` has made, by the default group, with which it ends
KEPT_MESHES: WeakKeyDictionary[Any, dict[tuple[Any, ...], "Mesh"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Mesh:
    """A rank's place among all ranks. The default is a single process that holds everything.

    It is not torch's DeviceMesh, which has axes and one process group for each. A Mesh has three
    DeviceMeshes as fields, and process groups that belong to no axis.

    `device_mesh` has the axes "edp" and "ep". `ep_group` carries the All-to-All, `counts_group` how
    many rows come in it, `edp_group` the expert gradients, `checkpoint_group` (gloo) checkpoints,
    `control_group` (gloo) what ranks ask each other, `world_group` dense gradients, losses and
    metrics (None: the default group). `dense_mesh`: the ranks over which dense weights are split
    (sharded.py); None: each rank holds them whole. `exact_mesh`: the same ranks, for the weights
    that are gathered in float32.

    A copy is the same object. A pickle has no groups and DeviceMeshes: it holds the place or, if
    ep_size is 1, the default place.
    """

    rank: int = 0
    world_size: int = 1
    ep_size: int = 1
    device_mesh: DeviceMesh | None = None
    ep_group: Any = None
    counts_group: Any = None
    edp_group: Any = None
    checkpoint_group: Any = None
    control_group: Any = None
    world_group: Any = None
    dense_mesh: DeviceMesh | None = None
    exact_mesh: DeviceMesh | None = None

    def __copy__(self) -> "Mesh":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        return self

    def __reduce__(self) -> Any:
        """Return how to make the mesh again, without groups.

        Where each rank has all experts, a process that reads the pickle needs no other one.
        """
        return Mesh, () if self.ep_size == 1 else (self.rank, self.world_size, self.ep_size)

    @property
    def edp_size(self) -> int:
        return self.world_size // self.ep_size

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    def local_experts(self, num_experts: int) -> range:
        """Return the ids of the experts that this rank holds."""
        if num_experts % self.ep_size:
            raise ValueError(
                f"num_experts is {num_experts}, allowed: multiples of ep_size ({self.ep_size})"
            )
        share = num_experts // self.ep_size
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks, bit-identical on each; x is not changed."""
        if self.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total, group=self.world_group)
        return total

    def true_on_all_ranks(self, statement: bool) -> bool:
        """Return whether it is true on every rank. Every rank must call it."""
        if self.world_size == 1:
            return statement
        true = torch.tensor(int(statement))
        dist.all_reduce(true, group=self.control_group)
        return int(true) == self.world_size

    def gather_on_rank_zero(self, value: Any) -> list[Any] | None:
        """Return on rank 0 the values of all ranks in order, None on others.

        Every rank must call it.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, group=self.control_group)
        return values


def build_mesh(ep_size: int, device: torch.device, timeout: timedelta) -> Mesh:
    """Make all groups and return this rank's place. Every rank of the default group must call it.

    Each group is made with the timeout, which it does not inherit from the default group.
    `init_device_mesh` would use the default group itself for a dimension that spans all ranks.
    Raises ValueError if ep_size does not divide the number of ranks, or if the rows of GPUs would
    travel over gloo.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % ep_size:
        raise ValueError(
            f"ep_size is {ep_size}, allowed: divisors of the number of ranks ({world_size})"
        )
    over_gloo = device.type == "cuda" and "cuda:gloo" in dist.get_backend_config()
    if over_gloo and ep_size > 1:
        raise ValueError(
            f"ep_size is {ep_size} (None: all ranks), allowed: 1, as the ranks were started with"
            " gloo, which sends no rows of a GPU. Start them with nccl, the default"
        )
    grid = torch.arange(world_size).view(-1, ep_size)

    # its kernels are short, and other ranks or the host wait
    def urgent_by_rows(ranks: Tensor, name: str) -> Any:
        if device.type != "cuda":
            return group_by_rows(ranks, name, timeout)
        return group_by_rows(ranks, name, timeout, pg_options=urgent(timeout))

    ep_group = urgent_by_rows(grid, "ep")
    counts_group = urgent_by_rows(grid, "counts")
    edp_group = group_by_rows(grid.T, "edp", timeout)
    checkpoint_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint")
    control_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
    device_mesh = DeviceMesh.from_group(
        [edp_group, ep_group], device.type, mesh=grid, mesh_dim_names=("edp", "ep")
    )
    if device.type == "cuda":
        start_communicators((None, ep_group, counts_group, edp_group), device)
    return Mesh(
        rank=rank,
        world_size=world_size,
        ep_size=ep_size,
        device_mesh=device_mesh,
        ep_group=ep_group,
        counts_group=counts_group,
        edp_group=edp_group,
        checkpoint_group=checkpoint_group,
        control_group=control_group,
    )


def with_kept_groups(make: Callable[..., Mesh], *layout: Any) -> Mesh:
    """Return make(*layout), or what an earlier call has made of the same layout.

    Every rank of the default group must call it. torch keeps a group until it is destroyed, and
    each group of gloo has three threads. A group cannot be destroyed after a training, because the
    module still sends rows through it.
    """
    meshes = KEPT_MESHES.setdefault(dist.group.WORLD, {})
    key = (make, *layout)
    if key not in meshes or not is_registered(meshes[key].control_group):
        meshes[key] = make(*layout)
    return meshes[key]


def give_up_groups() -> None:
    """Let no later training use the groups of this process.

    After an error, ranks may have begun different collectives in them.
    """
    KEPT_MESHES.clear()


def is_registered(group: Any) -> bool:
    """Return whether a group has not been destroyed."""
    try:
        dist.get_group_rank(group, dist.get_rank())
    except ValueError:
        return False
    return True


def group_by_rows(ranks: Tensor, name: str, timeout: timedelta, **options: Any) -> Any:
    """Make a group of each row of a matrix of ranks and return this rank's.

    Every rank must call it.
    """
    return dist.new_subgroups_by_enumeration(
        ranks.tolist(), timeout=timeout, group_desc=name, **options
    )[0]


def start_communicators(groups: Sequence[Any], device: torch.device) -> None:
    """Let NCCL make the communicators of these groups now, in one order on every rank.

    Otherwise each would be made at the first collective of its group, perhaps in a different order
    on each rank while a transfer runs, and a missing rank would be noticed late. The wait at the
    end makes the timeout apply to all of them. groups: None is the default one.
    """
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize(device)


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names (from `module`) and tensors of all expert shards.

    The module's class marks them: unlike an attribute on a tensor, it survives deepcopy, to_empty
    and compile.
    """
    for prefix, child in module.named_modules():
        if isinstance(child, Experts):
            yield from child.named_parameters(prefix, recurse=False)


def check_experts(module: nn.Module, mesh: Mesh) -> None:
    """Raise ValueError for experts that do not belong to this rank.

    A model that is built before the ranks exist has all experts. Each rank would train all of them,
    and they would differ from rank to rank without any error.
    """
    for name, child in module.named_modules():
        if not isinstance(child, Experts):
            continue
        held = child.expert_ids
        wanted = mesh.local_experts(child.num_experts)
        if held != wanted:
            raise ValueError(
                f"{name or type(child).__name__} holds experts {held.start} to {held.stop - 1} on"
                f" rank {mesh.rank}, but this rank must hold {wanted.start} to {wanted.stop - 1} of"
                f" {child.num_experts}. Build the model in configure_model or setup, from"
                " self.wire: before that, the ranks do not exist yet"
            )


def order_launches_of_nccl() -> None:
    """Let NCCL start the kernels of all groups in the order of their launch.

    That order is equal on all ranks (docs/decisions/0038-launch-order.md). A value that the user
    has set stays. Call it before the first group is made.
    """
    if torch.version.cuda:  # not on ROCm, where crashes with it are known
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


def what_prevents_overlap() -> list[str]:
    """Return a line for each environment variable with which a GPU hides less communication.

    The number of connections is read when CUDA starts, so it must be set before the command.
    """
    lines = []
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8")  # CUDA's own default
    if connections.isdecimal() and int(connections) < 8:
        lines.append(
            f"CUDA_DEVICE_MAX_CONNECTIONS is {connections}: kernels of different streams wait for"
            " each other in one queue, so less communication is hidden. Set it to 8 to 32, or"
            " leave it out"
        )
    for name in ("CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT"):
        if os.environ.get(name, "0") not in ("", "0"):
            lines.append(
                f"{name} is set: the host waits for the device, so no communication is hidden."
                " Leave it out"
            )
    return lines


def use_loopback_for_gloo() -> bool:
    """Let gloo use the loopback interface on one machine, unless the user has named another.

    By default it uses the host name's address, which many laptops and containers cannot reach.
    Return whether GLOO_INTERFACE was set.
    """
    if GLOO_INTERFACE in os.environ or "lo" not in (name for _, name in socket.if_nameindex()):
        return False
    os.environ[GLOO_INTERFACE] = "lo"
    return True


def stop_using_loopback() -> None:
    """Undo `use_loopback_for_gloo`. Groups that exist go on as they are."""
    os.environ.pop(GLOO_INTERFACE, None)
