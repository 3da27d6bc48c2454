"""What FSDP gathers if dense weights are split: which modules as one unit, which parameters in
float32, and which stay whole on every rank."""

import math
from collections import Counter
from collections.abc import Iterator

from torch import nn

from scmoe.moe.weights import InFloat32, WholeOnEveryRank


def units(module: nn.Module) -> list[nn.Module]:
    """Return what is gathered together: each entry of the outermost `nn.ModuleList`s, which hold a
    model's blocks. Everything else is gathered with the whole module.

    Raises ValueError if entries share a weight, which could be split with one of them alone.
    """
    blocks = [block for block in _entries(module) if any(True for _ in block.parameters())]
    uses = Counter(p for block in blocks for p in block.parameters())
    if any(number > 1 for number in uses.values()):
        raise ValueError("Blocks share weights, which cannot be split. Use dense='replicated'.")
    return blocks


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _entries(child)


def exact_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return what stays in float32 where matrices are gathered in bfloat16: routers (without
    selection biases, which nothing gathers), and vectors (norms, biases, scales of heads)."""
    vectors = {p for p in module.parameters() if math.prod(p.shape[1:]) == 1}
    return (router_parameters(module) | vectors) - whole_parameters(module)


def router_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return what is in float32 in a model of bfloat16 weights (bf16-true): routers."""
    return {p for m in module.modules() if isinstance(m, InFloat32) for p in m.parameters()}


def whole_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return what every rank keeps whole where dense weights are split: the routers' selection
    biases, which each rank moves by the same numbers."""
    kept_whole = (m for m in module.modules() if isinstance(m, WholeOnEveryRank))
    return {p for m in kept_whole for p in m.parameters()}
