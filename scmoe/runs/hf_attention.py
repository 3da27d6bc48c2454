"""Which keys each token attends to in a pass of transformers, and at which position it stands.

Padding may be at any place of a row. A row may also hold several texts one after the other
(packing); then position_ids start again at each text.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from scmoe.blocks.kv_cache import CAUSAL, Visible


class PassCache:
    """What the model reads in place of a KVCache. Keys and values are in transformers' cache, or
    only in this pass.

    positions_BS: of the new tokens. visible: which keys they attend to.
    """

    def __init__(self, cache: Cache | None, positions_BS: Tensor, visible: Visible) -> None:
        self.cache = cache
        self.layer = 0
        self.longest = int(positions_BS.max()) + 1
        self.positions_BS = positions_BS
        self.visible = visible

    def extend(
        self, attention: nn.Module, k_BHSd: Tensor, v_BHSd: Tensor
    ) -> tuple[Tensor, Tensor, Visible]:
        """Return keys, values and mask as KVCache.extend does. Attention modules call it in the
        order of the layers."""
        if self.cache is not None:
            k_BHSd, v_BHSd = self.cache.update(k_BHSd, v_BHSd, self.layer)
        self.layer += 1
        return k_BHSd, v_BHSd, self.visible


def has_packed_texts(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Return whether rows hold several texts: without a mask, positions do not go up by 1."""
    if attention_mask is not None or position_ids is None:
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def seen_in_pass(
    cache: Cache | None, attention_mask: Tensor | None, position_ids: Tensor | None, tokens: Tensor
) -> tuple[PassCache | None, Tensor | None]:
    """Return what the network gets as its cache, and its mask [B, S], False at padding. Either is
    None where the network does as well without: texts of one length from position 0.

    attention_mask: [B, tokens in the cache + new ones] or None. position_ids: [B or 1, S]; None:
    padding takes no position. tokens: [B, S, ...], the new ones. Raises ValueError for a mask or
    positions of another shape.
    """
    if cache is None and attention_mask is None and position_ids is None:
        return None, None  # before any value of a tensor is read, which torch.export cannot do

    batch_size, seq_len = tokens.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    mask_BL = whole_mask(attention_mask, (batch_size, past + seq_len), tokens.device)
    mask_BS = None if bool(mask_BL.all()) else mask_BL[:, -seq_len:]
    steps_S = torch.arange(seq_len, device=tokens.device)
    positions_BS = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -seq_len:]
    if position_ids is not None:
        positions_BS = expanded(position_ids, batch_size, seq_len)

    if has_packed_texts(attention_mask, position_ids):
        text_BS = (positions_BS.diff(dim=-1, prepend=positions_BS[:, :1] - 1) != 1).cumsum(1)
        is_same_BSS = text_BS[:, :, None] == text_BS[:, None]
        visible = Visible(mask_B1SL=(is_same_BSS & (steps_S <= steps_S[:, None]))[:, None])
        return PassCache(cache, positions_BS, visible), mask_BS
    if past or bool((mask_BL[:, 1:] & ~mask_BL[:, :-1]).any()):
        keys_L = torch.arange(past + seq_len, device=tokens.device)
        queries_S1 = keys_L[-seq_len:, None]
        # Padding attends to itself, because a softmax over nothing is not a number.
        mask_B1SL = mask_BL[:, None, None] & (keys_L < queries_S1) | (keys_L == queries_S1)
        return PassCache(cache, positions_BS, Visible(mask_B1SL=mask_B1SL)), mask_BS
    as_counted = position_ids is None or torch.equal(positions_BS, steps_S.expand_as(positions_BS))
    if cache is None and as_counted:
        return None, mask_BS
    return PassCache(cache, positions_BS, CAUSAL), mask_BS


def whole_mask(
    attention_mask: Tensor | None, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the mask [B, L] of all tokens, True at tokens.

    Raises ValueError if it has another shape than `size`.
    """
    if attention_mask is None:
        return torch.ones(size, dtype=torch.bool, device=device)
    if attention_mask.shape != size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but it must be {size}: texts,"
            " all tokens"
        )
    return attention_mask.bool()


def expanded(position_ids: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Return the positions of each row [B, S]."""
    if position_ids.shape not in ((batch_size, seq_len), (1, seq_len)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, but it must be"
            f" {(batch_size, seq_len)}: texts, new tokens"
        )
    return position_ids.expand(batch_size, seq_len)
