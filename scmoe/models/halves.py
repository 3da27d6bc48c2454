"""Two batches in flight: the halves of a rank's batch go through the blocks in turns
(moe/turns.py).

          half 1   attention | dispatch ...      | experts | combine ...         | attention
          half 2             | attention         | dispatch ... | experts        | combine ...

Each half is made of whole sequences. With an odd number the first half has one more. With one
sequence the second half is empty; this rank still takes part in its transfers. Outputs are those of
the whole batch where no capacity binds: a capacity and a buffer count the tokens of a half. Dropout
and a noisy gate draw in another order.

A network can have two batches in flight if it has a `Halves` and calls its blocks through it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.moe.balance import add_stats
from scmoe.moe.tokens import RouterStats
from scmoe.moe.turns import in_turns

Blocks = Callable[..., tuple[Tensor, list[RouterStats]]]


class Halves(nn.Module):
    """Runs all blocks of a network once, or once for each half of the batch in turns.

    It has no weights. batches_in_flight: 1 or 2; `run_as` alone sets it (run_as.py).
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches_in_flight = 1

    def forward(
        self, blocks: Blocks, x_BSD: Tensor, mask_BS: Tensor | None, cache: KVCache | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Return the stream and the routers' sums of the whole batch.

        blocks: called as blocks(x_BSD, mask_BS), and as blocks(x_BSD, mask_BS, cache) in
        generation.
        """
        if self.batches_in_flight == 1:
            return blocks(*with_cache(x_BSD, mask_BS, cache=cache))
        return in_halves(blocks, x_BSD, mask_BS, cache)


@torch.compiler.disable
def in_halves(
    blocks: Blocks, x_BSD: Tensor, mask_BS: Tensor | None, cache: KVCache | None
) -> tuple[Tensor, list[RouterStats]]:
    """Run all blocks for each half in turns. torch.compile cannot follow greenlets, so it compiles
    nothing inside; sub-layers that were compiled themselves stay compiled."""
    first, second = sizes_of_halves(len(x_BSD))
    x_halves = x_BSD.split([first, second])
    mask_halves = [None, None] if mask_BS is None else [mask_BS[:first], mask_BS[first:]]
    spans = [(0, first), (first, first + second)]
    caches = [None if cache is None else cache.texts(*span) for span in spans]
    halves = [
        partial(blocks, *with_cache(x, mask, cache=part))
        for x, mask, part in zip(x_halves, mask_halves, caches, strict=True)
    ]
    (y1_BSD, stats1), (y2_BSD, stats2) = in_turns(halves)
    stats = [add_stats(a, b) for a, b in zip(stats1, stats2, strict=True)]
    return torch.cat([y1_BSD, y2_BSD]), stats


def sizes_of_halves(sequences: int) -> tuple[int, int]:
    """Return the numbers of sequences of both halves of a batch."""
    return sequences - sequences // 2, sequences // 2
