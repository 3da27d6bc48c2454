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
    """forward(h): act(h). in_place(h): the same, in h's memory. into(h, out): the same, into a buffer.
    backward_into(da, h, out): the gradient of h, given that of act(h), into a buffer. Buffers that are reused stay in
    the processor's cache."""

    forward: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    backward_into: Callable[[Tensor, Tensor, Tensor], Tensor]
    widening: int = 1  # columns of h for each column of act(h)


def gelu_in_place(h_RF: Tensor, approximate: str) -> Tensor:
    return gelu_into(h_RF, h_RF, approximate)


def gelu_into(h_RF: Tensor, out_RF: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu.out(h_RF, approximate=approximate, out=out_RF)


def gelu_backward_into(da_RF: Tensor, h_RF: Tensor, out_RF: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(da_RF, h_RF, approximate=approximate, grad_input=out_RF)


def gelu(approximate: str) -> Activation:
    """Its functions are those of this module, so that a module with experts can be pickled."""
    return Activation(
        partial(F.gelu, approximate=approximate),
        partial(gelu_in_place, approximate=approximate),
        partial(gelu_into, approximate=approximate),
        partial(gelu_backward_into, approximate=approximate),
    )


def swiglu(h_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def swiglu_in_place(h_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    return F.silu(gate_RF, inplace=True).mul_(up_RF)


def swiglu_into(h_RF2: Tensor, out_RF: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate_RF, out=out_RF).mul_(up_RF)


def swiglu_backward_into(da_RF: Tensor, h_RF2: Tensor, out_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    dgate_RF, dup_RF = out_RF2.chunk(2, dim=-1)
    torch.mul(da_RF, F.silu(gate_RF), out=dup_RF)
    torch.ops.aten.silu_backward.grad_input(da_RF * up_RF, gate_RF, grad_input=dgate_RF)
    return out_RF2


ACTIVATIONS = {
    "gelu": gelu("none"),
    "gelu_tanh": gelu("tanh"),
    "swiglu": Activation(swiglu, swiglu_in_place, swiglu_into, swiglu_backward_into, widening=2),
}
