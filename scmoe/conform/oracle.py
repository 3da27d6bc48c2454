"""The plain layer as an Adapter in one process: what every answer of n ranks is compared with."""

import torch
from torch import Tensor

from scmoe.conform.adapter import RATE, Adapter, ByExpert, ByName, LowRank, Read
from scmoe.conform.plain import Plain, Weights, leaf


def plain_adapter(plain: Plain, given: Weights) -> Adapter:
    """Return the plain layer with these weights, and all hooks that have a plain meaning."""
    weights = plain.used(given)
    low_rank: dict[int, LowRank] = {}

    def effective() -> Weights:
        experts = {i: dict(expert) for i, expert in weights.experts.items()}
        for i, (a, b) in low_rank.items():
            experts[i]["up"] = experts[i]["up"] + b @ a
        return weights._replace(experts=experts)

    def forward(x_TD: Tensor) -> Tensor:
        return plain(effective(), x_TD)

    def masked(x_TD: Tensor, mask_T: Tensor) -> Tensor:
        rows = mask_T.nonzero()[:, 0]
        return torch.zeros_like(x_TD).index_put((rows,), forward(x_TD[rows]))

    def experts(read: Read) -> ByExpert:
        tensors = {
            i: {name: read(p) for name, p in expert.items()}
            for i, expert in weights.experts.items()
        }
        for i, (a, b) in low_rank.items():
            tensors[i] |= {"up_a": read(a), "up_b": read(b)}
        return tensors

    def dense(read: Read) -> ByName:
        named = {"router": read(weights.router)}
        return named | {"projection": read(weights.projection)} if plain.projection else named

    def parameters() -> list[Tensor]:
        of_experts = [p for expert in weights.experts.values() for p in expert.values()]
        return [weights.projection, weights.router, *of_experts]

    @torch.no_grad()
    def step() -> None:
        for p in parameters():
            if p.grad is not None:
                p -= RATE * p.grad
            p.grad = None

    def freeze() -> None:
        for expert in weights.experts.values():
            for p in expert.values():
                p.requires_grad_(False)

    def lora(factors: dict[int, LowRank]) -> None:
        low_rank.update({i: LowRank(*map(leaf, pair)) for i, pair in factors.items()})

    return Adapter(
        forward=forward,
        experts=experts,
        dense=dense,
        step=step,
        freeze=freeze,
        masked=masked,
        capacity=lambda slots: None,
        recompute=lambda: None,
        lora=lora,
        plain=plain,
    )
