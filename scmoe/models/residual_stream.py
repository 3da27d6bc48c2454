"""The residual stream: its type, and its way through the blocks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.moe.tokens import HandedOn, RouterStats


def widen_under_autocast(x: Tensor) -> Tensor:
    """Return x; under autocast in float32 or wider, so that every block adds to the stream in
    float32. FSDP may gather the weights before the blocks in bfloat16."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def run_blocks(
    blocks: Iterable[nn.Module], x_BSD: Tensor, mask_BS: Tensor | None, cache: KVCache | None = None
) -> tuple[Tensor, list[RouterStats]]:
    """Return the stream after the blocks, and the routers' sums of those that have one.

    cache: in generation. A block that follows one with HandedOn gets as `carry` what that one
    leaves.
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
