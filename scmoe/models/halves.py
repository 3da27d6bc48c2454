"""Two batches in flight: the halves of a rank's batch go through the blocks in turns
(moe/turns.py).

          half 1   attention | dispatch ...      | experts | combine ...         | attention
          half 2             | attention         | dispatch ... | experts        | combine ...

Each half is made of whole sequences. With an odd number the first half has one more. With one
sequence the second half is empty; this rank still takes part in its transfers. Outputs are those of
the whole batch where no capacity binds: a capacity and a buffer count the tokens of a half. Dropout
and a noisy gate draw in another order.

A network can have two batches in flight if it has the attribute `batches_in_flight` and calls
`in_flight` around its blocks. `set_in_flight` is the one place that sets the attribute, as
MoEBlock.run_as sets how a block runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.moe.balance import add_stats
from scmoe.moe.tokens import RouterStats
from scmoe.moe.turns import in_turns

Blocks = Callable[..., tuple[Tensor, list[RouterStats]]]


def in_flight(
    batches: int,
    blocks: Blocks,
    x_BSD: Tensor,
    mask_BS: Tensor | None,
    cache: KVCache | None = None,
) -> tuple[Tensor, list[RouterStats]]:
    """Run all blocks once, or once for each half of the batch in turns. Return the stream and the
    routers' sums of the whole batch.

    batches: 1 or 2, else ValueError. blocks: called as blocks(x_BSD, mask_BS), and as
    blocks(x_BSD, mask_BS, cache) in generation.
    """
    _check(batches)
    if batches == 1:
        return blocks(*with_cache(x_BSD, mask_BS, cache=cache))
    return _in_halves(blocks, x_BSD, mask_BS, cache)


@torch.compiler.disable
def _in_halves(
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


def has_halves(network: Any) -> bool:
    """Return whether a network can have two batches in flight."""
    return getattr(network, "batches_in_flight", None) is not None


def batches_of(network: Any) -> int:
    """Return how many batches a network has in flight."""
    return network.batches_in_flight if has_halves(network) else 1


def set_in_flight(network: Any, batches: int) -> None:
    """Let a network have so many batches in flight from the next pass on. network: the module that
    has the attribute, not DDP around it.

    Raises ValueError for another number than 1 and 2, for 2 if the network cannot have them, and if
    the network only forwards reads of the attribute to another one, which would not see the number.
    """
    _check(batches)
    if batches_of(network) == batches:
        return
    if not has_halves(network):
        raise ValueError(
            f"{type(network).__name__} has no attribute batches_in_flight, so it cannot have two"
            " batches in flight. Use scmoe.models.decoder.Decoder, or set the attribute to 1 and"
            " call scmoe.models.halves.in_flight around the blocks."
        )
    is_own = "batches_in_flight" in [*vars(network), *dir(type(network))]
    network.batches_in_flight = batches
    if not is_own and "batches_in_flight" in vars(network):
        del network.batches_in_flight
        raise ValueError(
            f"{type(network).__name__} only reads batches_in_flight of the network in it, which"
            f" would not see the number {batches}. Call set_in_flight with the network itself, or"
            " let the wrapper set the attribute there too."
        )


@contextmanager
def one_in_flight(network: Any) -> Iterator[None]:
    """Let a network have one batch in flight inside."""
    batches = batches_of(network)
    set_in_flight(network, 1)
    try:
        yield
    finally:
        set_in_flight(network, batches)


def _check(batches: int) -> None:
    if batches not in (1, 2):
        raise ValueError(f"batches_in_flight is {batches}, allowed: 1 | 2")
