"""Each activation equals its formula, and its derivative equals autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from scmoe.moe.experts import ACTIVATIONS
from tests import reference
from tests.support.models import assert_close


def hidden() -> torch.Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).requires_grad_()


def gelu_tanh(h: torch.Tensor) -> torch.Tensor:
    return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


FORMULAS = {
    "gelu": reference.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": lambda h: h[:, :6] * torch.sigmoid(h[:, :6]) * h[:, 6:],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula_and_derivative(name):
    act, h, plain = ACTIVATIONS[name], hidden(), hidden()
    a = act.forward(h)
    assert a.shape[1] * act.widening == h.shape[1]
    assert_close(a, FORMULAS[name](plain))
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (FORMULAS[name](plain) * weights).sum().backward()
    assert_close(act.into(h.detach(), torch.empty_like(a)), a)
    assert_close(act.in_place(h.detach().clone()), a)
    assert_close(act.backward_into(weights, h.detach(), torch.empty_like(h)), plain.grad)
