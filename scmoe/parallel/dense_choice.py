"""dense=auto: the first of replicated, hybrid and sharded that a rank's memory has room for."""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from scmoe.footprint.container import memory_limit
from scmoe.parallel.mesh import ParallelContext, expert_parameters

ROOM = 0.8  # of a rank's memory; the rest is for buffers of transfers and the allocator's gaps
GIB = 2**30


def pick_dense(estimates: Mapping[str, float], memory: float) -> tuple[str, str]:
    """Return the first way whose estimated bytes of a rank have room, else the last one, and why, in a line."""
    how = next((way for way, needed in estimates.items() if needed <= ROOM * memory), list(estimates)[-1])
    needed = ", ".join(f"{way} {size / GIB:.3g}" for way, size in estimates.items())
    return how, f"a rank of {memory / GIB:.3g} GiB is estimated to need, in GiB: {needed}"


def states_bytes(
    dense: float, experts: float, edp_size: int, world_size: int, node_size: int
) -> Iterator[tuple[str, float]]:
    """Yield each way of keeping dense weights with a rank's bytes of weights, gradients and AdamW's two moments.

    dense, experts: bytes of a rank's weights before they are split; edp_size ranks hold the same experts. There is no
    `hybrid` where a node has one rank or all."""
    yield "replicated", 4 * (dense + experts)
    if 1 < node_size < world_size:
        yield "hybrid", 4 * (dense / node_size + experts / edp_size)
    yield "sharded", 4 * (dense / world_size + experts / edp_size)


def estimates_of(module: nn.Module, context: ParallelContext, node_size: int) -> dict[str, float]:
    """Return for each way twice the bytes of weights, gradients and AdamW's moments; the factor 2 leaves room for
    activations, whose size is not known here. module: with this rank's experts."""
    experts = sum(p.nbytes for _, p in expert_parameters(module))
    dense = sum(p.nbytes for p in module.parameters()) - experts
    return {
        way: 2 * size for way, size in states_bytes(dense, experts, context.edp_size, context.world_size, node_size)
    }


def memory_of_rank(device: torch.device, node_size: int) -> float:
    """Return bytes: of the GPU, or a rank's share of this machine's memory, or of what its container may use."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(memory, memory_limit()) / node_size
