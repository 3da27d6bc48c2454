"""Activation checkpointing that leaves the MoE stream alone.

Attention, MLPs and experts are computed again in backward, so only their inputs are kept. What lies between them,
routing, layout and transfers, is kept: a second routing might differ (noise, ties), and a second transfer would cost
what the shortcut hides.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from scmoe.blocks.sublayers import MLP, Residual
from scmoe.moe.experts import Experts


def recompute_activations(model: nn.Module) -> None:
    """Every sub-layer, shared expert and Experts module of `model` keeps its input instead of its activations."""
    inside = {child for m in model.modules() if isinstance(m, Residual) for child in m.modules() if child is not m}
    for module in model.modules():
        if isinstance(module, (Residual, MLP, Experts)) and module not in inside:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
