"""torch.compile for the parts of a model that are one graph each: sub-layers and shared experts.

A whole block cannot be one graph: the MoE stream's layout and transfers are not compiled, and each of them would be a
graph break. Sub-layers of equal shape share one graph.
"""

from torch import nn

from scmoe.blocks.sublayers import MLP, Residual, outermost


def compile_sublayers(model: nn.Module) -> int:
    """Compiles every sub-layer and shared expert of `model` and returns their number. A first step takes seconds."""
    parts = list(outermost(model, (Residual, MLP)))
    for part in parts:
        part.compile()
    return len(parts)
