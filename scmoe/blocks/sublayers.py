"""The parts of a Transformer block: attention, MLP, and the residual sub-layer around either."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal multi-head self-attention, softmax(Q K^T / sqrt(D/H)) V. Flash attention where torch has it."""

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads is {heads}, allowed: divisors of dim ({dim})")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, dim=-1))
        y_BHSd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHSd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """GELU(x W_in) W_out: the MLP of Block-MLP, and the shared expert."""

    def __init__(self, dim: int, ffn_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, ffn_dim, bias=bias)
        self.w_out = nn.Linear(ffn_dim, dim, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w_out(F.gelu(self.w_in(x_BSD)))


class Residual(nn.Module):
    """x + dropout(f(norm(x))), the pre-norm sub-layer."""

    def __init__(self, norm: nn.Module, f: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.f, self.dropout = norm, f, nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.dropout(self.f(self.norm(x_BSD)))
