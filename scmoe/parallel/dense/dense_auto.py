"""The choice of dense=auto: the first mode of dense weights (sharded.py) whose estimated memory
fits.

The modes are replicated, hybrid and sharded, in this order: the later ones need less memory and
more communication.
"""

from collections.abc import Mapping

import torch
from torch import nn

from scmoe.parallel.container_memory import GIB, machine_memory, memory_limit
from scmoe.parallel.mesh import Mesh, expert_parameters

# of a rank's memory; the rest is for buffers of transfers and the allocator's gaps
USED_SHARE = 0.8


def pick_dense(estimates: Mapping[str, float], memory: float) -> tuple[str, str]:
    """Return the first mode whose estimated bytes fit into a rank's memory, else the last one.

    Also return why, in a line. estimates: by mode, the least communication first.
    """
    how = next(
        (mode for mode, needed in estimates.items() if needed <= USED_SHARE * memory),
        list(estimates)[-1],
    )
    needed = ", ".join(f"{mode} {size / GIB:.3g}" for mode, size in estimates.items())
    return how, f"a rank of {memory / GIB:.3g} GiB is estimated to need, in GiB: {needed}"


def possible_modes(module: nn.Module, world_size: int, edp_size: int, node_size: int) -> list[str]:
    """Return the modes of dense weights that can be used, the least communication first.

    There is no `hybrid` where a node has one rank or all, and only `replicated` where the experts'
    dim or ffn_dim is no multiple of edp_size, the ranks that hold them.
    """
    if any(p.shape[1] % edp_size for _, p in expert_parameters(module)):  # as `shard` requires
        return ["replicated"]
    return (
        ["replicated", "hybrid", "sharded"]
        if 1 < node_size < world_size
        else ["replicated", "sharded"]
    )


def memory_estimates(module: nn.Module, mesh: Mesh, node_size: int) -> dict[str, float]:
    """Return for each mode twice the bytes of weights, gradients and AdamW's moments.

    The factor 2 leaves room for activations, whose size is not known here. module: with this rank's
    experts.
    """
    experts = sum(p.nbytes for _, p in expert_parameters(module))
    dense = sum(p.nbytes for p in module.parameters()) - experts
    weights = {
        "replicated": dense + experts,
        "hybrid": dense / node_size + experts / mesh.edp_size,
        "sharded": dense / mesh.world_size + experts / mesh.edp_size,
    }
    return {
        mode: 8 * weights[mode]
        for mode in possible_modes(module, mesh.world_size, mesh.edp_size, node_size)
    }


def memory_of_rank(device: torch.device, node_size: int) -> float:
    """Return the bytes of memory that a rank may use.

    They are the GPU's, or a rank's share of this machine's memory, or of what its container may
    use.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return min(machine_memory(), memory_limit()) / node_size
