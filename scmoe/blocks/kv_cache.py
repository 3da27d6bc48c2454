"""Keys and values of the tokens that each text of a batch has so far (KV cache).

The caller holds it, no module does.

    cache = KVCache(batch_size, capacity)
    cache.expect([1, 1, 0], 1)        positions of the tokens that come next, and which keys each of
                                      them sees
    model(ids_BS, mask_BS, cache)     each attention module appends its keys and values

A pass may bring a whole prompt, a piece of one, or one new token of each text. Texts are padded at
their end, so a token has the same position in every batch, and the first pass is causal attention
without another mask.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Visible(NamedTuple):
    """Which keys each query attends to.

    is_causal: the keys are those of the same pass, and a query attends to its own token's and to
    earlier ones. mask_B1SL: False: not to this key. Without either, to all keys.
    """

    is_causal: bool = False
    mask_B1SL: Tensor | None = None


CAUSAL = Visible(is_causal=True)


class KVCache:
    """Buffers of `capacity` tokens for each text.

    Those of an attention module are made at its first call of `extend`. What is kept is the
    module's choice: keys and values of each head, or one latent and one key for all (latent.py).

    lengths: tokens of each text, with those of the next pass; the host counts them, so nothing
    waits for the device. positions_BS: of the next pass's tokens; 0: padding.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device | None = None) -> None:
        self.capacity = capacity
        self.lengths, self.longest = [0] * batch_size, 0
        self.positions_BS: Tensor
        # keys and values of each attention module, [B, H, capacity + 1, d]
        self.buffers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._places_L = torch.arange(capacity, device=device)
        # the lengths, on the device
        self._ends_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        # place of each expected token; padding's is the text's spare one, the last
        self._slots_B1S1: Tensor
        self._visible: Visible
        self._texts = slice(None)  # those of the buffers that are read and written

    def expect(self, new: Sequence[int], seq_len: int) -> None:
        """Make place for the tokens of the next pass.

        new: tokens of each text, at most seq_len; what follows them in a row of seq_len tokens is
        padding, which is not kept. Raises ValueError where a text would exceed the capacity.
        """
        is_first = self.longest == 0
        self.lengths = [old + n for old, n in zip(self.lengths, new, strict=True)]
        self.longest = max(self.lengths)
        if self.longest > self.capacity:
            raise ValueError(
                f"a text has {self.longest} tokens, allowed: up to {self.capacity}, the cache's"
                " capacity"
            )
        steps_S = torch.arange(seq_len, device=self._ends_B1.device)
        self.positions_BS = slots_BS = self._ends_B1 + steps_S
        new_B1: int | Tensor = seq_len
        if min(new) < seq_len:
            new_B1 = torch.tensor(new, device=steps_S.device)[:, None]
            self.positions_BS = self.positions_BS.where(steps_S < new_B1, 0)
            slots_BS = slots_BS.where(steps_S < new_B1, self.capacity)
        self._ends_B1 = self._ends_B1 + new_B1
        self._slots_B1S1 = slots_BS[:, None, :, None]
        if is_first:
            self._visible = CAUSAL
        elif seq_len == 1 and min(self.lengths) == self.longest and min(new) == 1:
            self._visible = Visible()  # the new tokens are all texts' last ones
        else:
            self._visible = Visible(
                mask_B1SL=self._places_L[: self.longest] <= self.positions_BS[:, None, :, None]
            )

    def texts(self, first: int, last: int) -> "KVCache":
        """Return the cache of some texts, for the pass that `expect` has announced.

        Both share their buffers.
        """
        part = copy.copy(self)
        part._texts = slice(first, last)
        part.lengths = self.lengths[first:last]
        part.positions_BS = self.positions_BS[first:last]
        part._slots_B1S1 = self._slots_B1S1[first:last]
        if self._visible.mask_B1SL is not None:
            part._visible = Visible(mask_B1SL=self._visible.mask_B1SL[first:last])
        return part

    def extend(
        self, attention: nn.Module, k_BHSd: Tensor, v_BHSd: Tensor
    ) -> tuple[Tensor, Tensor, Visible]:
        """Append keys and values, whose sizes d may differ.

        Return all of them [B, H, L, d], and which of them each query attends to.
        """
        if attention not in self.buffers:
            B, H = len(self._ends_B1), k_BHSd.shape[1]
            places = self.capacity + 1
            keys_BHLd = k_BHSd.new_zeros(B, H, places, k_BHSd.shape[3])
            self.buffers[attention] = keys_BHLd, v_BHSd.new_zeros(B, H, places, v_BHSd.shape[3])
        keys_BHLd, values_BHLd = (buffer[self._texts] for buffer in self.buffers[attention])
        keys_BHLd.scatter_(2, self._slots_B1S1.expand_as(k_BHSd), k_BHSd)
        values_BHLd.scatter_(2, self._slots_B1S1.expand_as(v_BHSd), v_BHSd)
        if self._visible.is_causal:
            return k_BHSd, v_BHSd, self._visible
        return keys_BHLd[:, :, : self.longest], values_BHLd[:, :, : self.longest], self._visible


def with_cache(*inputs: Any, cache: KVCache | None) -> tuple[Any, ...]:
    """Return the arguments of a block or sub-layer: the inputs, and the cache where there is one.

    So a module of a user that keeps nothing of earlier tokens need not accept a cache.
    """
    return inputs if cache is None else (*inputs, cache)
