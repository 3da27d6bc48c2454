"""The residual stream: its type, and its way through the blocks. Which modules FSDP gathers as one
unit, and which parameters it gathers in float32, if dense weights are split."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.moe.router import Router, SelectionBias
from scmoe.moe.tokens import HandedOn, RouterStats


def through(
    blocks: Iterable[nn.Module], x_BSD: Tensor, mask_BS: Tensor | None, cache: KVCache | None = None
) -> tuple[Tensor, list[RouterStats]]:
    """Return the stream after the blocks, and the routers' sums of those that have one.

    cache: in generation. A block that follows one with HandedOn gets as `carry` what that
    one leaves.
    """
    all_stats: list[RouterStats] = []
    carry_BSD: Tensor | None = None
    for block in blocks:
        inputs = with_cache(x_BSD, mask_BS, cache=cache)
        output = block(*inputs) if carry_BSD is None else block(*inputs, carry=carry_BSD)
        carry_BSD = output.carry_BSD if isinstance(output, HandedOn) else None
        x_BSD, stats, *_ = output
        all_stats += [] if stats is None else [stats]
    return x_BSD, all_stats


def units(module: nn.Module) -> list[list[nn.Module]]:
    """Return what is gathered together: each entry of the outermost `nn.ModuleList`s, which hold a
    model's blocks. Neighbours that share a weight (DGMoE-Share) are one unit. Everything else is
    gathered with the whole module.
    """
    found: list[list[nn.Module]] = []
    for block in _entries(module):
        own = set(block.parameters())
        if found and own & {p for other in found[-1] for p in other.parameters()}:
            found[-1].append(block)
        elif own:
            found.append([block])
    return found


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
    return {p for m in module.modules() if isinstance(m, Router) for p in m.parameters()}


def whole_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return what every rank keeps whole where dense weights are split: the routers' selection
    biases, of which each rank moves its own by the same numbers."""
    return {m.weight for m in module.modules() if isinstance(m, SelectionBias)}


def residual_stream(x: Tensor) -> Tensor:
    """Return x in float32 or wider under autocast, where what comes before the blocks may be
    gathered in bfloat16: then every block adds to it in float32."""
    return (
        x.to(torch.promote_types(x.dtype, torch.float32))
        if torch.is_autocast_enabled(x.device.type)
        else x
    )
