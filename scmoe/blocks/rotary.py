"""Rotary position embedding (RoPE) in LLaMA's form: features i and i + d/2 of a head are turned as one plane.

    (a, b) at position s  ->  (a cos - b sin, b cos + a sin),   angle = s theta^(-2i/d)

So the product of a query and a key depends on their distance only. Each call computes the angles again, in float32 or
wider: there is no buffer that a change of dtype could round.
"""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Turns [..., S, d] by its positions; d must be even. It has no weights."""

    def __init__(self, theta: float = 10000.0) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, x_Sd: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """positions_S: may have dimensions before S, as x; None: 0 to S - 1."""
        seq_len, size = x_Sd.shape[-2:]
        wide = torch.promote_types(x_Sd.dtype, torch.float32)
        powers_d = torch.arange(0, size, 2, device=x_Sd.device).to(wide) / size
        positions_S = torch.arange(seq_len, device=x_Sd.device) if positions_S is None else positions_S
        angles_Sd = positions_S.to(wide)[..., None] * self.theta**-powers_d
        cos_Sd, sin_Sd = angles_Sd.cos(), angles_Sd.sin()
        a_Sd, b_Sd = x_Sd.chunk(2, dim=-1)
        return torch.cat([a_Sd * cos_Sd - b_Sd * sin_Sd, b_Sd * cos_Sd + a_Sd * sin_Sd], dim=-1).to(x_Sd.dtype)
