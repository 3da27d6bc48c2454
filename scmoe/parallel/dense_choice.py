"""dense=auto: the first of replicated, hybrid and sharded that a rank's memory has room for."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from scmoe.parallel.mesh import ParallelContext, expert_parameters

ROOM = 0.8  # of a rank's memory; the rest is for buffers of transfers and the allocator's gaps
GIB = 2**30
CONTAINER = Path("/sys/fs/cgroup")  # the control group of this process, version 2


def pick_dense(estimates: Mapping[str, float], memory: float) -> tuple[str, str]:
    """Return the first way whose estimated bytes of a rank have room, else the last one, and why, in a line."""
    how = next((way for way, needed in estimates.items() if needed <= ROOM * memory), list(estimates)[-1])
    needed = ", ".join(f"{way} {size / GIB:.3g}" for way, size in estimates.items())
    return how, f"a rank of {memory / GIB:.3g} GiB is estimated to need, in GiB: {needed}"


def ways(world_size: int, node_size: int) -> list[str]:
    """Return the ways of keeping dense weights, the least communication first. There is no `hybrid` where a node has
    one rank or all."""
    return ["replicated", "hybrid", "sharded"] if 1 < node_size < world_size else ["replicated", "sharded"]


def estimates_of(module: nn.Module, context: ParallelContext, node_size: int) -> dict[str, float]:
    """Return for each way twice the bytes of weights, gradients and AdamW's moments; the factor 2 leaves room for
    activations, whose size is not known here. module: with this rank's experts."""
    experts = sum(p.nbytes for _, p in expert_parameters(module))
    dense = sum(p.nbytes for p in module.parameters()) - experts
    weights = {
        "replicated": dense + experts,
        "hybrid": dense / node_size + experts / context.edp_size,
        "sharded": dense / context.world_size + experts / context.edp_size,
    }
    return {way: 8 * weights[way] for way in ways(context.world_size, node_size)}


def memory_of_rank(device: torch.device, node_size: int) -> float:
    """Return bytes: of the GPU, or a rank's share of this machine's memory, or of what its container may use."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(memory, memory_limit()) / node_size


def memory_limit() -> float:
    """Return the bytes that the container of this process may use; infinite without a limit."""
    file = CONTAINER / "memory.max"
    limit = file.read_text().strip() if file.exists() else "max"
    return math.inf if limit == "max" else float(limit)


def memory_in_use() -> float:
    """Return the bytes that the container uses, without pages of files that are not in use: they are given back."""
    if not (CONTAINER / "memory.current").exists():
        return 0.0
    stat = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
    return float((CONTAINER / "memory.current").read_text()) - float(stat.get("inactive_file", 0))
