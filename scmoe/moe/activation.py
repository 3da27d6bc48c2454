"""The activation function between the two products of MLPs and experts: GELU, GPT-2's tanh GELU, or LLaMA's SwiGLU.

    gelu, gelu_tanh   act(h) = GELU(h)                      h = x W_in, F wide
    swiglu            act(h) = SiLU(h[:F]) * h[F:]          h = x W_in, 2F wide: gate and up side by side

Each has its derivative, because the experts' backward is written by hand (experts.py).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """backward(da, h): the gradient of h, given that of act(h)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    widening: int = 1  # columns of h for each column of act(h)


def gelu_backward(da_RF: Tensor, h_RF: Tensor, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu_backward(da_RF, h_RF, approximate=approximate)


def swiglu(h_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def swiglu_backward(da_RF: Tensor, h_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    dh_RF2 = torch.empty_like(h_RF2)
    dgate_RF, dup_RF = dh_RF2.chunk(2, dim=-1)
    torch.mul(da_RF, F.silu(gate_RF), out=dup_RF)
    torch.ops.aten.silu_backward.grad_input(da_RF * up_RF, gate_RF, grad_input=dgate_RF)
    return dh_RF2


ACTIVATIONS = {
    "gelu": Activation(F.gelu, gelu_backward),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), partial(gelu_backward, approximate="tanh")),
    "swiglu": Activation(swiglu, swiglu_backward, widening=2),
}
