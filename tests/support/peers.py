"""This module compares our modules with those of transformers, given the same random weights.

The tolerance is 1e-5 of the largest entry in float32: the same sums in another order, with rounding
errors of 6e-8.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router, Scoring
from scmoe.moe.stream import MoEStream
from tests.support.models import assert_close, gradients, randomise

DIM, FFN, EXPERTS = 16, 24, 6
TOLERANCE = 1e-5
Take = Callable[[nn.Parameter], Tensor]  # returns the parameter, or its gradient


def stream(top_k: int, scoring: Scoring = Scoring(), zero_experts: int = 0) -> MoEStream:  # noqa: B008
    router = Router(DIM, EXPERTS, top_k, scoring=scoring, zero_experts=zero_experts)
    return MoEStream(router, Experts(DIM, FFN, EXPERTS, activation="swiglu"), LocalDispatcher())


def stacked(experts: nn.Module, take: Take) -> dict[str, Tensor]:
    """Return their experts' weights in our layout; theirs is [E, out, in], with gate above up."""
    w_in, w_out = take(experts.gate_up_proj), take(experts.down_proj)
    w_in = w_in[: len(w_out)]  # LongCat-Flash's has rows of zero experts, which nothing reads
    return {"experts.w_in_eDF": w_in.transpose(1, 2), "experts.w_out_eFD": w_out.transpose(1, 2)}


def swiglu_mlp(mlp: nn.Module, take: Take) -> dict[str, Tensor]:
    w_in = torch.cat([take(mlp.gate_proj.weight), take(mlp.up_proj.weight)])
    return {"w_in.weight": w_in, "w_out.weight": take(mlp.down_proj.weight)}


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}


def check_equal(
    ours: nn.Module,
    theirs: nn.Module,
    weights: Callable[[nn.Module, Take], dict[str, Tensor]],
    run_ours: Callable[[Tensor], Tensor],
    run_theirs: Callable[[Tensor], Tensor],
    tolerance: float = TOLERANCE,
) -> None:
    """Compare outputs and gradients; weights returns their parameters or gradients under our
    names, in our layout."""
    randomise(theirs.float())
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) / 10)
    with torch.no_grad():
        copies = weights(theirs, lambda p: p)
        assert copies.keys() == dict(ours.named_parameters()).keys()
        for name, p in ours.named_parameters():
            p.copy_(copies[name])
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(2, 10, DIM, generator=generator)
    x, their_x = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    y, their_y = run_ours(x), run_theirs(their_x)
    assert_close(y, their_y, tolerance, "output")
    dy = torch.randn(y.shape, generator=generator)
    (y * dy).sum().backward()
    (their_y * dy).sum().backward()
    assert_close(x.grad, their_x.grad, tolerance, "gradient of the input")
    expected = weights(theirs, lambda p: p.grad)
    for name, grad in gradients(ours).items():
        assert expected[name].abs().max() > 1e-3, name
        assert_close(grad, expected[name], tolerance, f"gradient of {name}")


class Called(nn.Module):
    """Calls their attention with the input alone, as ours is called."""

    def __init__(self, attention: nn.Module, angles: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.attention, self.angles = attention, angles

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.attention(
            hidden_states=x_BSD, position_embeddings=self.angles, attention_mask=None
        )[0]
