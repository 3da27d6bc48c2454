"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434).

Queries, and keys with values, go through a low rank.

    c_q = norm(W_qa x) s_q                      a query's latent; without one, q = W_q x
    [q_h, r_h] = W_qb c_q                       of head h: r_h is turned by its position, q_h not
    [c, r] = W_kva x, c = norm(c) s_kv          latent of keys and values; one key part r for all
                                                heads, turned too
    [k_h, v_h] = W_kvb c
    A_h = softmax((q_h k_h + turn(r_h) turn(r)) / sqrt(nope + rope)) v_h
    out = W_o [A_1 .. A_H], or W_o (sigmoid(W_g x) * [A_1 .. A_H]) with a gate

A cache holds c and turn(r) of each token instead of keys and values of all heads. With earlier
tokens in the cache, W_kvb is applied to queries and results instead of to every latent of the
cache: q_h (W_k c) = (q_h W_k) c.

s_q, s_kv: sqrt(D / rank) in LongCat-Flash, else 1. The gate is Instella's. The norms have an
epsilon of their own. The turned features are adjacent pairs. With YaRN the scores are multiplied by
(0.1 ln factor + 1)^2, as in DeepSeek-V3. Letters of dims here: c latent, n nope, r rope, v value, L
tokens in the cache.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe.blocks.kv_cache import CAUSAL, KVCache, Visible
from scmoe.blocks.rotary import Rotary
from scmoe.blocks.sublayers import PartedAttention

LATENT_EPS = 1e-6  # of both norms, in every published model


class LatentSizes(NamedTuple):
    """Ranks of the latents, and features of a head."""

    q_rank: int | None  # None: queries have no latent
    kv_rank: int
    nope_dim: int  # of queries and keys, without a position
    rope_dim: int  # of queries and keys, with a position
    value_dim: int


class LatentAttention(PartedAttention):
    """Causal attention through latents.

    scaled: the latents are multiplied by sqrt(dim / rank). gated: the heads' results are multiplied
    by a sigmoid of x.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        sizes: LatentSizes,
        rotary: Rotary,
        scaled: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        q_rank, kv_rank, nope, rope, value = sizes
        if rope % 2:
            raise ValueError(
                f"rope_dim is {rope}, allowed: even numbers, as positions turn pairs of features"
            )
        self.dim = dim
        self.heads = heads
        self.sizes = sizes
        self.rotary = rotary
        self.scale = (nope + rope) ** -0.5 * (0.1 * math.log(rotary.yarn_factor) + 1) ** 2
        self.q_scale = (dim / q_rank) ** 0.5 if scaled and q_rank else 1.0
        self.kv_scale = (dim / kv_rank) ** 0.5 if scaled else 1.0
        self.q_down = None if q_rank is None else nn.Linear(dim, q_rank, bias=False)
        self.q_norm = None if q_rank is None else nn.RMSNorm(q_rank, LATENT_EPS)
        self.q_up = nn.Linear(q_rank or dim, heads * (nope + rope), bias=False)
        self.kv_down = nn.Linear(dim, kv_rank + rope, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank, LATENT_EPS)
        self.kv_up = nn.Linear(kv_rank, heads * (nope + value), bias=False)
        self.gate = nn.Linear(dim, heads * value, bias=False) if gated else None
        self.out = nn.Linear(heads * value, dim, bias=False)

    def core(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the heads' results [B, S, H value].

        cache: has the latents of the tokens before x; those of x are appended.
        """
        positions = None if cache is None else cache.positions_BS[:, None]
        q_BHSn, q_BHSr = self.queries(x_BSD)
        latent_BSc, k_BSr = self.kv_down(x_BSD).split([self.sizes.kv_rank, self.sizes.rope_dim], -1)
        c_B1Sc = (self.kv_norm(latent_BSc) * self.kv_scale)[:, None]
        k_B1Sr = self.turn(k_BSr[:, None], positions)
        q_BHSr = self.turn(q_BHSr, positions)
        visible = CAUSAL
        if cache is not None:
            c_B1Sc, k_B1Sr, visible = cache.extend(self, c_B1Sc, k_B1Sr)
        # without earlier tokens, keys and values of all heads are computed once for each token
        attend = self.attend_expanded if visible.is_causal else self.attend_absorbed
        y_BHSv = attend(q_BHSn, q_BHSr, c_B1Sc, k_B1Sr, visible)
        y_BSv = y_BHSv.transpose(1, 2).flatten(2)
        return y_BSv if self.gate is None else y_BSv * self.gate(x_BSD).sigmoid()

    def queries(self, x_BSD: Tensor) -> list[Tensor]:
        """Return queries [B, H, S, nope] and [B, H, S, rope], which are not turned yet."""
        if self.q_down is not None and self.q_norm is not None:
            x_BSD = self.q_norm(self.q_down(x_BSD)) * self.q_scale
        q_BHSd = self.q_up(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return q_BHSd.split([self.sizes.nope_dim, self.sizes.rope_dim], -1)

    def attend_expanded(
        self, q_BHSn: Tensor, q_BHSr: Tensor, c_B1Sc: Tensor, k_B1Sr: Tensor, visible: Visible
    ) -> Tensor:
        """Return attention with W_kvb applied to the latents, [B, H, S, value]: every head has its
        keys and values."""
        kv_BHSd = self.kv_up(c_B1Sc[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BHSn, v_BHSv = kv_BHSd.split([self.sizes.nope_dim, self.sizes.value_dim], -1)
        k_BHSd = torch.cat([k_BHSn, k_B1Sr.expand(-1, self.heads, -1, -1)], -1)
        q_BHSd = torch.cat([q_BHSn, q_BHSr], -1)
        return self.scaled_attention(q_BHSd, k_BHSd, v_BHSv, visible)

    def attend_absorbed(
        self, q_BHSn: Tensor, q_BHSr: Tensor, c_B1Lc: Tensor, k_B1Lr: Tensor, visible: Visible
    ) -> Tensor:
        """Return the same with W_kvb applied to queries and results: the latents of the L tokens
        serve as keys and values."""
        nope, _, value = self.sizes[2:]
        w_Hdc = weight_of(self.kv_up, c_B1Lc).unflatten(0, (self.heads, -1))
        w_Hnc, w_Hvc = w_Hdc.split([nope, value], 1)
        q_BHSd = torch.cat([q_BHSn @ w_Hnc, q_BHSr], -1)
        k_BHLd = torch.cat([c_B1Lc, k_B1Lr], -1).expand(-1, self.heads, -1, -1)
        c_BHLc = c_B1Lc.expand(-1, self.heads, -1, -1)
        return self.scaled_attention(q_BHSd, k_BHLd, c_BHLc, visible) @ w_Hvc.mT

    def scaled_attention(
        self, q_BHSd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, visible: Visible
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHSd, k_BHLd, v_BHLd, visible.mask_B1SL, is_causal=visible.is_causal, scale=self.scale
        )

    def turn(self, x_Sd: Tensor, positions_S: Tensor | None) -> Tensor:
        """Turn adjacent pairs. The result has the pairs' first features, then their second ones."""
        return self.rotary(torch.cat([x_Sd[..., 0::2], x_Sd[..., 1::2]], -1), positions_S)

    @property
    def mixed(self) -> int:
        return self.heads * (self.sizes.nope_dim + self.sizes.rope_dim + self.sizes.value_dim)


def weight_of(linear: nn.Module, like: Tensor) -> Tensor:
    """Return W of a module x W^T, for x of the size, dtype and device of `like`.

    With adapters (LoRA), quantised or offloaded weights, W is what the module returns for the
    identity; else it is the parameter. The identity costs as much as `like.shape[-1]` tokens.
    """
    hooked = "forward" in vars(linear) or linear._forward_pre_hooks or linear._forward_hooks
    if type(linear) is nn.Linear and not hooked:
        return linear.weight
    return linear(torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)).mT
