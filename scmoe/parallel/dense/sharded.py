"""Dense weights split over ranks, with FSDP2 (`fully_shard`): each rank keeps a part of every
weight, gradient, moment.

    sharded    dense weights over all ranks
    hybrid     dense weights over the ranks of a node, with a copy on each node
    both       experts over the ranks that hold the same ones (edp), on dim 1, so that any number of
               experts is split

A block's weights are gathered before its forward and before its backward, and its gradients are
summed over the ranks and split after its backward. So no collective of FSDP starts between the
begin and the end of an MoE stream. FSDP does not average: the loss is divided by the number of
ranks before backward, and all gradients are plain sums. (torch divides twice on a mesh of one rank,
and gloo has no sum with a factor.)
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scmoe.parallel.dense.fsdp_units import (
    exact_parameters,
    router_parameters,
    units,
    whole_parameters,
)
from scmoe.parallel.dense.shared_units import share_between_turns
from scmoe.parallel.mesh import Mesh, expert_parameters, group_by_rows, start_communicators
from scmoe.parallel.torch_seam import (
    gather_as_kept,
    gather_in_background,
    hide_from_ddp,
    split_over,
)

MODES = ("replicated", "sharded", "hybrid", "auto")
REFUSED = {  # arguments of DDPStrategy, and why they cannot be honoured
    "model_averaging_period": "weights would be averaged over ranks that hold different experts."
    " Leave it out",
    "timeout": "use timeout_s, which has seconds",
}
NOT_OF_DDP = (
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "process_group_backend",
    "start_method",
)


def check_dense(dense: str, ddp: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown mode, for arguments of DDPStrategy that cannot be honoured,
    and for arguments of DDP where DDP is not used."""
    if dense not in MODES:
        raise ValueError(f"dense is {dense!r}, allowed: {', '.join(MODES)}")
    for name, reason in REFUSED.items():
        if name in ddp:
            raise ValueError(f"{name} is not supported: {reason}")
    if dense != "replicated" and (unused := sorted(ddp.keys() - set(NOT_OF_DDP))):
        raise ValueError(
            f"{unused[0]} is an argument of DDP, which dense={dense!r} does not use. Leave it out,"
            " or use dense='replicated'."
        )


def with_dense_mesh(
    mesh: Mesh, how: str, node_size: int, device: torch.device, timeout: timedelta
) -> Mesh:
    """Return the mesh with `dense_mesh` and `exact_mesh` for `sharded` or `hybrid`.

    Every rank of the default group must call it.

    node_size: ranks of one node, with consecutive numbers. ValueError: `hybrid` where a node has
    one rank or all.
    """
    ranks = torch.arange(mesh.world_size)
    axes = {"shards": ranks.view(1, -1)}
    if how == "hybrid":
        if not 1 < node_size < mesh.world_size or mesh.world_size % node_size:
            raise ValueError(
                f"dense is hybrid with {mesh.world_size} ranks, {node_size} a node, but it needs"
                " 2 or more nodes of 2 or more ranks. Use sharded"
            )
        ranks = ranks.view(-1, node_size)
        axes = {"copies": ranks.T, "shards": ranks}

    def device_mesh(purpose: str) -> DeviceMesh:
        groups = [group_by_rows(grid, f"{purpose}-{axis}", timeout) for axis, grid in axes.items()]
        if device.type == "cuda":
            start_communicators(groups, device)
        return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=tuple(axes))

    return replace(mesh, dense_mesh=device_mesh("dense"), exact_mesh=device_mesh("exact"))


def shard(module: nn.Module, mesh: Mesh, precision: str) -> None:
    """Split all parameters of `module` as `mesh.dense_mesh` says; they may be on the meta
    device.

    precision: Lightning's. Under bf16-mixed, matrices are gathered in bfloat16: gathered in
    float32, each would have a bfloat16 copy by autocast, kept until backward. Routers and vectors
    (norms, biases, head scales) stay in float32. Under bf16-true routers alone are in float32.
    Selection biases are not split. ValueError: the experts' dim or ffn_dim is not a multiple of the
    number of ranks that hold them (edp_size); blocks share weights.
    """
    assert (
        mesh.device_mesh is not None and mesh.dense_mesh is not None and mesh.exact_mesh is not None
    )
    experts = dict(expert_parameters(module))
    for name, p in experts.items():
        if p.shape[1] % mesh.edp_size:
            raise ValueError(
                f"{name} is {tuple(p.shape)}. Where dense weights are split, its dim 1 must be a"
                f" multiple of the {mesh.edp_size} ranks that hold these experts. Raise ep_size"
            )
    mixed = precision == "bf16-mixed"
    places = dict.fromkeys(experts.values(), split_over(mesh.device_mesh["edp"], 1))
    in_float32 = split_over(mesh.exact_mesh, 0)
    unsplit = whole_parameters(module)
    if mixed:
        places |= dict.fromkeys(exact_parameters(module), in_float32)
    elif precision == "bf16-true":  # FSDP gathers parameters of one type together
        places |= dict.fromkeys(router_parameters(module) - unsplit, in_float32)
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed else None,
        reduce_dtype=torch.float32 if precision.startswith("bf16") else None,
        cast_forward_inputs=False,
    )
    blocks = units(module)
    for unit in [*blocks, module]:
        backward_begins_here = unit is module or unit is blocks[-1]
        fully_shard(
            unit,
            mesh=mesh.dense_mesh,
            reshard_after_forward=not backward_begins_here,
            shard_placement_fn=places.get,
            mp_policy=narrow,
            ignored_params=unsplit,
        )
        assert isinstance(unit, FSDPModule)
        # A sum with another factor (PREMUL_SUM) is refused by gloo, and NCCL's of bfloat16 with
        # a power of two gives zeros up to torch 2.13 (pytorch issue 190745).
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        gather_as_kept(unit, in_float32)
        share_between_turns(unit)
    prefetch(module)


def prefetch(module: nn.Module) -> None:
    """Let a unit's weights be gathered while the unit before it computes, on CPUs.

    It acts in forward and in backward. On CPUs FSDP would otherwise wait for each gather; on GPUs
    FSDP gathers ahead of the computation anyway, on its own stream.
    """
    split = next(p for p in module.parameters() if isinstance(p, DTensor))
    if split.device_mesh.device_type == "cpu":
        in_order = [m for m in [module, *units(module)] if isinstance(m, FSDPModule)]
        for unit, following in itertools.pairwise(in_order):
            unit.set_modules_to_forward_prefetch([following])
        gather_in_background(in_order[0])


def hide_own_weights(module: nn.Module, is_split: bool) -> None:
    """Hide from DDP, and from Lightning where it does not fit, the weights in which ranks differ.

    Otherwise every rank's would be overwritten with rank 0's. They are the experts, and all weights
    where dense ones are split.
    """
    weights = module.named_parameters() if is_split else expert_parameters(module)
    hide_from_ddp(module, [name for name, _ in weights])


def check_placements(module: nn.Module, mesh: Mesh) -> None:
    """Raise ValueError for a module that an earlier fit has split in another way.

    Its optimizers would fail.
    """
    wanted = None if mesh.dense_mesh is None else mesh.dense_mesh.ndim
    first = next(iter(module.parameters()), None)
    axes = first.device_mesh.ndim if isinstance(first, DTensor) else None
    if first is not None and axes != wanted:
        names = {None: "replicated", 1: "sharded", 2: "hybrid"}
        raise ValueError(
            f"dense is {names[wanted]}, but an earlier run has made this module's weights"
            f" {names[axes]}. Use dense={names[axes]}, or a new module that loads the checkpoint"
        )


def reshard(module: nn.Module) -> None:
    """Let every parameter be this rank's part again.

    After a forward without backward, the last block and the outermost unit are whole.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that this rank holds of some tensors."""
    return sum(local(tensor).nbytes for tensor in tensors)


@torch.no_grad()
def make_equal(module: nn.Module, mesh: Mesh) -> None:
    """Broadcast each part of a weight from the first rank that holds it to the others.

    Unsplit dense weights are left to DDP or Lightning. Buffers of split modules are rank 0's, as
    in DDP. Weights differ if the ranks' generators differed when the module was built.
    """
    groups = {p: mesh.edp_group for _, p in expert_parameters(module) if mesh.edp_size > 1}
    groups |= dict.fromkeys(
        whole_parameters(module), dist.group.WORLD if mesh.world_size > 1 else None
    )
    for p in module.parameters():
        if isinstance(p, DTensor):
            group = p.device_mesh.get_group("copies") if copies(p) > 1 else None
        else:
            group = groups.get(p)
        if group is not None:
            dist.broadcast(local(p), dist.get_global_rank(group, 0), group)
    for buffer in module.buffers() if mesh.dense_mesh is not None else ():
        sent = buffer.contiguous()
        dist.broadcast(sent, 0)
        buffer.copy_(sent)


def copies(tensor: DTensor) -> int:
    """Return how many ranks hold the same part."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return next((size for size, placement in sizes if placement.is_replicate()), 1)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy this rank's part of a whole value into a tensor, split or not."""
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.detach(), target.device_mesh, target.placements, src_data_rank=None
        ).to_local()
    local(target).copy_(value)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device memory on `device`, of which nothing is set.

    Tied ones stay tied.
    """
    made: dict[Any, nn.Parameter] = {}
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            if p.is_meta:
                made.setdefault(
                    p, nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                )
                setattr(owner, name, made[p])


class Steps(nn.Module):
    """Calls a LightningModule as a module: its steps then run inside the hooks of its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
