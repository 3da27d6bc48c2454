"""Dense weights split over ranks, with FSDP2 (`fully_shard`): each rank keeps a part of every
weight, gradient, moment.

    sharded    dense weights over all ranks
    hybrid     dense weights over the ranks of a node, with a copy on each node
    both       experts over the ranks that hold the same ones (edp), on dim 1, so that any number of
               experts is split

A block's weights are gathered before its forward and before its backward, and its gradients are
summed over the ranks and split after its backward. So no collective of FSDP starts between the
begin and the end of an MoE stream. FSDP divides nothing: the loss is divided by the number of ranks
before backward, and all gradients are plain sums. (torch divides twice on a mesh of one rank, and
gloo has no sum with a factor.)
"""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scmoe.models.fsdp_units import exact_parameters, router_parameters, units, whole_parameters
from scmoe.parallel.mesh import (
    ParallelContext,
    expert_parameters,
    group_by_rows,
    start_communicators,
)
from scmoe.parallel.shared_units import share_between_turns
from scmoe.parallel.torch_seam import (
    gather_as_kept,
    gather_in_background,
    hide_from_ddp,
    split_over,
)

ROOM = 0.8  # of a rank's memory; the rest is for buffers of transfers and the allocator's gaps
GIB = 2**30
CONTAINER = Path("/sys/fs/cgroup")  # the control group of this process, version 2
WAYS = ("replicated", "sharded", "hybrid", "auto")
NOT_OF_DDP = (
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "process_group_backend",
    "start_method",
)


def check_dense(dense: str, ddp: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown way, and for arguments of DDP where DDP is not used."""
    if dense not in WAYS:
        raise ValueError(f"dense is {dense!r}, allowed: {', '.join(WAYS)}")
    if dense != "replicated" and (unused := sorted(ddp.keys() - set(NOT_OF_DDP))):
        raise ValueError(
            f"{unused[0]} is an argument of DDP, which dense={dense!r} does not use. Leave it out,"
            " or use dense='replicated'."
        )


def with_dense_mesh(
    context: ParallelContext, how: str, node_size: int, device: torch.device, timeout: timedelta
) -> ParallelContext:
    """Return the context with the meshes of `sharded` or `hybrid`.

    Every rank of the default group must call it.

    node_size: ranks of one node, with consecutive numbers. ValueError: `hybrid` where a node has
    one rank or all.
    """
    ranks = torch.arange(context.world_size)
    axes = {"shards": ranks.view(1, -1)}
    if how == "hybrid":
        if not 1 < node_size < context.world_size or context.world_size % node_size:
            raise ValueError(
                f"dense is hybrid with {context.world_size} ranks, {node_size} a node, but it needs"
                " 2 or more nodes of 2 or more ranks. Use sharded"
            )
        ranks = ranks.view(-1, node_size)
        axes = {"copies": ranks.T, "shards": ranks}

    def mesh(purpose: str) -> DeviceMesh:
        groups = [group_by_rows(grid, f"{purpose}-{axis}", timeout) for axis, grid in axes.items()]
        if device.type == "cuda":
            start_communicators(groups, device)
        return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=tuple(axes))

    context = replace(context, dense_mesh=mesh("dense"), exact_mesh=mesh("exact"))
    # sums begin on a thread (update/wrap.py), and FSDP gathers experts over mesh["edp"]
    if device.type == "cpu":
        assert context.mesh is not None
        context = replace(
            context, edp_group=group_by_rows(context.mesh.mesh.T, "expert gradients", timeout)
        )
    return context


def shard(module: nn.Module, context: ParallelContext, precision: str) -> None:
    """Split all parameters of `module` as `context.dense_mesh` says; they may be on the meta
    device.

    precision: Lightning's. Under bf16-mixed, matrices are gathered in bfloat16: gathered in
    float32, each would have a bfloat16 copy by autocast, kept until backward. Routers and vectors
    (norms, biases, head scales) stay in float32. Under bf16-true routers alone are in float32.
    Selection biases are not split. ValueError: an expert's width is not a multiple of the number of
    ranks that hold this expert.
    """
    assert (
        context.mesh is not None
        and context.dense_mesh is not None
        and context.exact_mesh is not None
    )
    experts = dict(expert_parameters(module))
    for name, p in experts.items():
        if p.shape[1] % context.edp_size:
            raise ValueError(
                f"{name} is {tuple(p.shape)}. Where dense weights are split, its dim 1 must be a"
                f" multiple of the {context.edp_size} ranks that hold these experts. Raise ep_size"
            )
    mixed = precision == "bf16-mixed"
    places = dict.fromkeys(experts.values(), split_over(context.mesh["edp"], 1))
    in_float32 = split_over(context.exact_mesh, 0)
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
    whole = [module]
    for unit in [*blocks, whole]:
        backward_begins_here = unit is whole or unit is blocks[-1]
        fully_shard(
            unit if len(unit) > 1 else unit[0],
            mesh=context.dense_mesh,
            reshard_after_forward=not backward_begins_here,
            shard_placement_fn=places.get,
            mp_policy=narrow,
            ignored_params=unsplit,
        )
        for part in (m for m in unit if isinstance(m, FSDPModule)):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            gather_as_kept(part, in_float32)
            share_between_turns(part, len(unit))
    prefetch(module)


def prefetch(module: nn.Module) -> None:
    """Let a unit's weights be gathered while the unit before it computes.

    This holds in forward and in backward, on CPUs alone, where FSDP would wait for each gather. On
    GPUs it gathers on a stream, ahead of the computation.
    """
    mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
    if mesh.device_type == "cpu":
        in_order = [
            m for m in [module, *(unit[0] for unit in units(module))] if isinstance(m, FSDPModule)
        ]
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


def check_placements(module: nn.Module, context: ParallelContext) -> None:
    """Raise ValueError for a module that an earlier fit has split in another way.

    Its optimizers would fail.
    """
    wanted = None if context.dense_mesh is None else context.dense_mesh.ndim
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

    After a forward without backward the outermost unit is whole.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def make_equal(module: nn.Module, context: ParallelContext) -> None:
    """Broadcast each part of a weight from the first rank that holds it to the others.

    Buffers of split modules are rank 0's, as DDP does for whole modules. Weights differ if the
    ranks' generators differed when the module was built.
    """
    groups = {p: context.edp_group for _, p in expert_parameters(module) if context.edp_size > 1}
    groups |= dict.fromkeys(
        whole_parameters(module), dist.group.WORLD if context.world_size > 1 else None
    )
    for p in module.parameters():
        if isinstance(p, DTensor):
            group = p.device_mesh.get_group("copies") if copies(p) > 1 else None
        else:
            group = groups.get(p)
        if group is not None:
            dist.broadcast(local(p), dist.get_global_rank(group, 0), group)
    for buffer in module.buffers() if context.dense_mesh is not None else ():
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


# ---------------------------------------------------------------------- dense=auto


def pick_dense(estimates: Mapping[str, float], memory: float) -> tuple[str, str]:
    """Return the first way that has room for its estimated bytes of a rank, else the last one.

    Also return why, in a line.
    """
    how = next(
        (way for way, needed in estimates.items() if needed <= ROOM * memory), list(estimates)[-1]
    )
    needed = ", ".join(f"{way} {size / GIB:.3g}" for way, size in estimates.items())
    return how, f"a rank of {memory / GIB:.3g} GiB is estimated to need, in GiB: {needed}"


def ways(module: nn.Module, world_size: int, edp_size: int, node_size: int) -> list[str]:
    """Return the ways of keeping dense weights, the least communication first.

    There is no `hybrid` where a node has one rank or all, and only `replicated` where an expert's
    width is no multiple of the edp_size ranks that hold it.
    """
    if any(p.shape[1] % edp_size for _, p in expert_parameters(module)):  # as `shard` requires
        return ["replicated"]
    return (
        ["replicated", "hybrid", "sharded"]
        if 1 < node_size < world_size
        else ["replicated", "sharded"]
    )


def estimates_of(module: nn.Module, context: ParallelContext, node_size: int) -> dict[str, float]:
    """Return for each way twice the bytes of weights, gradients and AdamW's moments.

    The factor 2 leaves room for activations, whose size is not known here. module: with this rank's
    experts.
    """
    experts = sum(p.nbytes for _, p in expert_parameters(module))
    dense = sum(p.nbytes for p in module.parameters()) - experts
    weights = {
        "replicated": dense + experts,
        "hybrid": dense / node_size + experts / context.edp_size,
        "sharded": dense / context.world_size + experts / context.edp_size,
    }
    return {
        way: 8 * weights[way]
        for way in ways(module, context.world_size, context.edp_size, node_size)
    }


def memory_of_rank(device: torch.device, node_size: int) -> float:
    """Return the bytes of memory that a rank may use.

    They are the GPU's, or a rank's share of this machine's memory, or of what its container may
    use.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(memory, memory_limit()) / node_size


def memory_limit() -> float:
    """Return the bytes that the container of this process may use; infinite without a limit."""
    file = CONTAINER / "memory.max"
    limit = file.read_text(encoding="utf-8").strip() if file.exists() else "max"
    return math.inf if limit == "max" else float(limit)


def memory_in_use() -> float:
    """Return the bytes that the container uses.

    Pages of files that are not in use are left out: they are given back.
    """
    if not (CONTAINER / "memory.current").exists():
        return 0.0
    stat = dict(
        line.split()
        for line in (CONTAINER / "memory.stat").read_text(encoding="utf-8").splitlines()
    )
    return float((CONTAINER / "memory.current").read_text(encoding="utf-8")) - float(
        stat.get("inactive_file", 0)
    )
