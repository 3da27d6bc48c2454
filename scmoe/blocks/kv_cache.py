"""Keys and values of the tokens that each text of a batch has so far (KV cache). The caller holds it, no module does.

    cache = KVCache(batch_size, capacity)
    cache.expect(mask_BS)             positions of the tokens that come next, and which keys each of them sees
    model(ids_BS, mask_BS, cache)     each attention module appends its keys and values

A pass may bring a whole prompt, a piece of one, or one new token of each text. Texts are padded at their end, so a
token has the same position in every batch, and the first pass is causal attention without another mask.
"""

from typing import Any

import torch
from torch import Tensor, nn


class KVCache:
    """Buffers of `capacity` tokens for each text. Those of an attention module are made at its first call of `extend`.

    What is kept is the module's choice: keys and values of each head, or one latent and one key for all (latent.py).

    lengths_B: tokens of each text, with those of the next pass. positions_BS: of the next pass's tokens; 0: padding.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device | None = None) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0  # of lengths_B, known to the host
        self.positions_BS: Tensor
        self.buffers: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # [B (capacity + 1), H, d]: keys, values
        self._keys_L = torch.arange(capacity, device=device)
        self._starts_B1 = torch.arange(batch_size, device=device)[:, None] * (capacity + 1)
        self._slots_N: Tensor  # row of the buffers for each expected token; padding's is the text's spare one, the last
        self._is_first: bool
        self._seen: dict[str, Any]

    def expect(self, mask_BS: Tensor) -> None:
        """Makes place for the tokens of the next pass. mask_BS False: padding, at the end of a row, which is not kept.

        Raises ValueError where a text would exceed the capacity."""
        assert len(mask_BS) == self.batch_size
        places_BS = self.lengths_B[:, None] + torch.arange(mask_BS.shape[1], device=mask_BS.device)
        self.lengths_B = self.lengths_B + mask_BS.sum(1)
        self._is_first, self.longest = self.longest == 0, int(self.lengths_B.max())
        if self.longest > self.capacity:
            raise ValueError(f"a text has {self.longest} tokens, allowed: up to {self.capacity}, the cache's capacity")
        self.positions_BS = places_BS.where(mask_BS, 0)
        self._slots_N = (self._starts_B1 + places_BS.where(mask_BS, self.capacity)).flatten()
        self._seen = {"attn_mask": self._keys_L[: self.longest] <= self.positions_BS[:, None, :, None]}

    def extend(self, attention: nn.Module, k_BHSd: Tensor, v_BHSd: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Appends keys and values. Returns all of them [B, H, L, d], and the mask for scaled_dot_product_attention.

        Their sizes d may differ."""
        if attention not in self.buffers:
            (_, heads, _, size), rows = k_BHSd.shape, self.batch_size * (self.capacity + 1)
            values = v_BHSd.new_zeros(rows, heads, v_BHSd.shape[-1])
            self.buffers[attention] = k_BHSd.new_zeros(rows, heads, size), values
        for buffer_NHd, new_BHSd in zip(self.buffers[attention], (k_BHSd, v_BHSd), strict=True):
            buffer_NHd.index_copy_(0, self._slots_N, new_BHSd.transpose(1, 2).flatten(0, 1))
        if self._is_first:
            return k_BHSd, v_BHSd, {"is_causal": True}
        keys, values = (b.unflatten(0, (self.batch_size, -1))[:, : self.longest] for b in self.buffers[attention])
        return keys.transpose(1, 2), values.transpose(1, 2), self._seen
