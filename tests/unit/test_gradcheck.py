"""A block's gradients equal finite differences in float64, for every architecture, its input and every weight."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.blocks import build_blocks
from tests.support.models import randomise, tiny

BLOCKS = {
    "dense": "moe.architecture=dense",
    "top-1": "moe.architecture=top_k",
    "top-2": "moe.architecture=top_k moe.top_k=2",
    "shared-expert": "moe.architecture=shared_expert moe.combine=cg2",
    "pos1": "moe.position=pos1",
    "pos2": "moe.position=pos2",
    "pos2-direct_add-reads-no-gate": "moe.position=pos2 moe.combine=direct_add",
    "pos2-cg2-reads-tap": "moe.position=pos2 moe.combine=cg2 moe.coefficient_input=tap moe.tap_norm=shared",
    "pos3": "moe.position=pos3",
    "scmoe-2": "moe.position=pos2 moe.top_k=2",
    "scmoe-2-chunks": "moe.position=pos2 moe.top_k=2 schedule.chunks=2",
    "every-block": "moe.position=pos1 moe.every=1",
}


@pytest.mark.parametrize("capacity", ("null", "1.0"))
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_a_block_equal_finite_differences(name, capacity):
    """fast_mode checks one random direction of outputs and of each input, at gradcheck's default tolerance of 1e-5."""
    overrides = "model.dim=8 model.ffn_dim=8 moe.num_experts=3", BLOCKS[name], f"moe.capacity_factor={capacity}"
    block = randomise(build_blocks(tiny(*" ".join(overrides).split()), ParallelContext())[0].double())
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*block.named_parameters(), strict=True)

    def f(x_BSD, *weights):
        y_BSD, stats = functional_call(block, dict(zip(names, weights, strict=True)), (x_BSD,))
        return y_BSD if stats is None else (y_BSD, stats.score_sums_E, stats.z_sum)

    torch.manual_seed(0)  # gradcheck draws its directions from it
    assert torch.autograd.gradcheck(f, (x_BSD, *weights), fast_mode=True)
