"""The oracle: a mixture of experts in one process, slow, flat and obviously right.

    y = sum over a token's K best experts of  weight_i E_i(x P^T)
    E(x) = down act(up x)    or    down (silu(gate x) * up x)

It loops over tokens, and autograd does the rest. It knows nothing of ranks, and nothing of this
project's own layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPERTS = 8
TOP_K = 2
DIM = 16
WIDTH = 24

ACTIVATION_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
}


class Weights(NamedTuple):
    """The weights of the layer that is asked. projection: before router and experts, for layers
    that can have one: it shows whether gradients reach what lies before the layer."""

    projection: Tensor  # [D, D]
    router: Tensor  # [E, D]
    experts: dict[int, dict[str, Tensor]]  # gate, up: [F, D]; down: [D, F]


@dataclass(frozen=True)
class Plain:
    """A layer's formula.

    activation: swiglu, which has a gate; gelu, relu, silu, which have none; or identity: an expert
    returns its input. score: softmax or sigmoid, over all experts. normalise: the kept scores of a
    token are divided by their sum. projection: tokens are multiplied by a dense weight first.
    """

    activation: str = "swiglu"
    score: str = "softmax"
    normalise: bool = True
    projection: bool = True

    def __call__(self, weights: Weights, x_TD: Tensor) -> Tensor:
        if self.projection:
            x_TD = x_TD @ weights.projection.T
        outputs = [self.token_output(weights, x_D) for x_D in x_TD]
        return torch.stack(outputs) if outputs else x_TD

    def token_output(self, weights: Weights, x_D: Tensor) -> Tensor:
        scores_E = SCORES[self.score](weights.router @ x_D)
        kept = scores_E.topk(TOP_K).indices.tolist()
        total = sum(scores_E[i] for i in kept) if self.normalise else 1.0
        y_D = torch.zeros_like(x_D)
        for i in kept:
            y_D = y_D + scores_E[i] / total * self.expert_output(weights.experts[i], x_D)
        return y_D

    def expert_output(self, expert: dict[str, Tensor], x_D: Tensor) -> Tensor:
        if self.activation == "identity":
            return x_D
        up_F = expert["up"] @ x_D
        if self.activation == "swiglu":
            return expert["down"] @ (F.silu(expert["gate"] @ x_D) * up_F)
        return expert["down"] @ ACTIVATION_FORMULAS[self.activation](up_F)

    def used(self, weights: Weights) -> Weights:
        """Return the weights as leaves of autograd, without gates if there are none."""
        names = {"swiglu": ("gate", "up", "down"), "identity": ()}
        used = names.get(self.activation, ("up", "down"))
        experts = {
            i: {name: leaf(expert[name]) for name in used} for i, expert in weights.experts.items()
        }
        return Weights(leaf(weights.projection), leaf(weights.router), experts)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()
