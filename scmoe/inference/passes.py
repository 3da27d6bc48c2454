"""The passes of a generation: prefill reads prompts, whole or in pieces; decode reads one token of each text.

They set no_grad and not inference mode, because FSDP cannot begin in it. A caller without FSDP may set it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scmoe.blocks.kv_cache import KVCache
from scmoe.models.decoder import Decoder

Shape = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Passes:
    """How the passes of a generation run.

    all_ranks: whether a statement is true on all ranks (ParallelContext.true_on_all_ranks); with one rank, the
    statement itself. piece: tokens of a prompt that one pass reads; None: all of them. begin: called with the shape of
    the passes that come next, so that the model can run as is best for it (planned.py).
    """

    all_ranks: Callable[[bool], bool] = bool
    piece: int | None = None
    begin: Callable[[Shape], None] = lambda shape: None


ALONE = Passes()


def read_prompts(model: Decoder, ids_BS: Tensor, mask_BS: Tensor, cache: KVCache, passes: Passes) -> Tensor:
    """Reads all prompts, piece by piece; returns [B, V], the logits after each row's last token.

    Every rank takes as many passes as the one with the longest prompt, and brings padding when its own are read."""
    longest = ids_BS.shape[1]
    size, start, logits_BV = passes.piece or longest, 0, None
    while logits_BV is None or not passes.all_ranks(start >= longest):
        piece_BS, own_BS = ids_BS[:, start : start + size], mask_BS[:, start : start + size]
        if start >= longest:
            piece_BS, own_BS = ids_BS[:, :1], torch.zeros_like(mask_BS[:, :1])
        after_BV = prefill(model, piece_BS, own_BS, cache)
        logits_BV = after_BV if logits_BV is None else after_BV.where(own_BS.any(1, keepdim=True), logits_BV)
        start += size
    return logits_BV


@torch.no_grad()
def prefill(model: Decoder, ids_BS: Tensor, mask_BS: Tensor, cache: KVCache) -> Tensor:
    """Reads prompts, or the next piece of each; returns [B, V], the logits after each row's last token.

    mask_BS False: padding, at the end of a row. A row of padding alone has logits without a meaning."""
    new_B, seq_len = mask_BS.sum(1), ids_BS.shape[1]
    new = new_B.tolist()
    cache.expect(new, seq_len)
    last_B = (new_B - 1).clamp(min=0)
    return model(ids_BS, None if min(new) == seq_len else mask_BS, cache, last_B).logits_BSV[:, 0]


@torch.no_grad()
def decode(model: Decoder, ids_B: Tensor, going: Sequence[bool], cache: KVCache) -> Tensor:
    """Reads one token of each text and returns [B, V]. going False: the text has ended, and its token is padding."""
    cache.expect(list(map(int, going)), 1)
    mask_B1 = None if all(going) else torch.tensor(going, device=ids_B.device)[:, None]
    return model(ids_B[:, None], mask_B1, cache).logits_BSV[:, 0]
