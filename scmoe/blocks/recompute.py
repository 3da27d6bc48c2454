"""Activation checkpointing that leaves the MoE stream as it is.

Attention, MLPs and experts are computed again in backward, so only their inputs are kept. Routing, layout and transfers
are not repeated: a second routing could differ (noise, ties), and a second transfer would cost the time that the
shortcut hides.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from scmoe.blocks.sublayers import MLP, Residual
from scmoe.moe.experts import Experts


def recompute_activations(model: nn.Module) -> None:
    """Makes every sub-layer, shared expert and Experts module of `model` keep its input, not its activations."""
    inside = {child for m in model.modules() if isinstance(m, Residual) for child in m.modules() if child is not m}
    for module in model.modules():
        if isinstance(module, (Residual, MLP, Experts)) and module not in inside:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
