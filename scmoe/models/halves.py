"""Two batches in flight: the halves of a rank's batch go through the blocks in turns
(moe/turns.py).

          half 1   attention | dispatch ...      | experts | combine ...         | attention
          half 2             | attention         | dispatch ... | experts        | combine ...

A half has whole sequences. Of an odd number the first half has one more, and of a single sequence
the second half is empty, so that it takes part in the transfers of other ranks. Outputs are those
of the whole batch where no capacity binds: a capacity and a buffer count the tokens of a half.
Dropout and a noisy gate draw in another order.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.moe.balance import add_stats
from scmoe.moe.tokens import RouterStats
from scmoe.moe.turns import in_turns

Way = Callable[..., tuple[Tensor, list[RouterStats]]]


@torch.compiler.disable
def in_flight(
    batches: int, way: Way, x_BSD: Tensor, mask_BS: Tensor | None, cache: KVCache | None = None
) -> tuple[Tensor, list[RouterStats]]:
    """Return the stream and the routers' sums of way(x_BSD, mask_BS), run as so many batches in
    turns.

    batches: 1 or 2. way: from the first block to the last one. cache: in generation; `way` gets it
    after the mask.
    """
    if batches == 1:
        return way(*with_cache(x_BSD, mask_BS, cache=cache))
    total = len(x_BSD)
    first = total - total // 2
    x_halves = x_BSD.split([first, total - first])
    mask_halves = [None, None] if mask_BS is None else [mask_BS[:first], mask_BS[first:]]
    spans = [(0, first), (first, total)]
    caches = [None if cache is None else cache.texts(*span) for span in spans]
    halves = [
        partial(way, *with_cache(x, mask, cache=part))
        for x, mask, part in zip(x_halves, mask_halves, caches, strict=True)
    ]
    (y1_BSD, stats1), (y2_BSD, stats2) = in_turns(halves)
    stats = [add_stats(a, b) for a, b in zip(stats1, stats2, strict=True)]
    return torch.cat([y1_BSD, y2_BSD]), stats
