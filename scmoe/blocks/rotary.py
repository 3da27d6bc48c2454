"""Rotary position embedding (RoPE), and YaRN for texts longer than those of the training."""

import math

import torch
from torch import Tensor, nn

YARN_POSITIONS, MOST_TURNS = 4096, 32  # in every published model with YaRN that we read


class Rotary(nn.Module):
    """Rotary position embedding (RoPE) in LLaMA's form.

    Features i and i + d/2 of a head are turned as one plane.

        (a, b) at position s  ->  (a cos - b sin, b cos + a sin),   angle = s theta^(-2i/d)

    So the product of a query and a key depends on their distance only. It turns [..., S, d] with an
    even d, and has no weights. Each call computes the angles again, in float32 or wider: no buffer
    exists that a change of dtype could round.

    yarn_factor: above 1, planes that turn less than once in 4096 positions turn as many times
    slower, planes that turn 32 times or more are as before, and those between are interpolated
    (YaRN, arXiv 2309.00071, section 3.2).
    """

    def __init__(self, theta: float = 10000.0, yarn_factor: float = 1.0) -> None:
        super().__init__()
        self.theta, self.yarn_factor = theta, yarn_factor

    def forward(self, x_Sd: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Return x turned by its positions.

        positions_S: may have dimensions before S, as x; None: 0 to S - 1.
        """
        seq_len, size = x_Sd.shape[-2:]
        wide = torch.promote_types(x_Sd.dtype, torch.float32)
        powers_d = torch.arange(0, size, 2, device=x_Sd.device).to(wide) / size
        speeds_d = self.theta**-powers_d
        if self.yarn_factor != 1:
            speeds_d = speeds_d * (1 - self.slowed(size, speeds_d) * (1 - 1 / self.yarn_factor))
        if positions_S is None:
            positions_S = torch.arange(seq_len, device=x_Sd.device)
        angles_Sd = positions_S.to(wide)[..., None] * speeds_d
        cos_Sd, sin_Sd = angles_Sd.cos(), angles_Sd.sin()
        a_Sd, b_Sd = x_Sd.chunk(2, dim=-1)
        turned_Sd = [a_Sd * cos_Sd - b_Sd * sin_Sd, b_Sd * cos_Sd + a_Sd * sin_Sd]
        return torch.cat(turned_Sd, dim=-1).to(x_Sd.dtype)

    def slowed(self, size: int, speeds_d: Tensor) -> Tensor:
        """Return how far each plane is slowed down, 0 to 1.

        It is a ramp from the plane that turns 32 times to that of one turn.
        """

        def plane(turns: int) -> float:
            exponent = math.log(YARN_POSITIONS / (turns * 2 * math.pi))
            return size * exponent / (2 * math.log(self.theta))

        first = max(math.floor(plane(MOST_TURNS)), 0)
        last = max(min(math.ceil(plane(1)), size - 1), first + 0.001)  # the ramp may be a step
        ramp_d = (torch.arange(size // 2, device=speeds_d.device) - first) / (last - first)
        return ramp_d.clamp(0, 1).to(speeds_d)
