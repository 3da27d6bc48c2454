"""Activation checkpointing that leaves the MoE stream as it is.

Attention, MLPs and experts are computed again in backward, so only their inputs are kept. Routing, layout and transfers
are not repeated: a second routing could differ (noise, ties), and a second transfer would cost the time that the
shortcut hides.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scmoe.blocks.sublayers import MLP, Residual, outermost
from scmoe.moe.experts import Experts


def recompute_activations(model: nn.Module) -> None:
    """Makes every sub-layer, shared expert and Experts module of `model` keep its input, not its activations."""
    for module in outermost(model, (Residual, MLP, Experts)):
        module.forward = recomputed(module.forward)


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns `forward` with checkpointing. As a function of its own, unlike a partial, it can be compiled."""

    def recompute(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return recompute
