"""Direct Add, CG-1 and CG-2 (Eq. 14-16) equal the oracle."""

import pytest
import torch

from scmoe.moe.coefficient import COEFFICIENT_GATES
from tests import reference
from tests.support.models import DIM, assert_close, randomise


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("combine", COEFFICIENT_GATES)
def test_equals_the_oracle(combine):
    gate = randomise(COEFFICIENT_GATES[combine](DIM).double())
    weight = None if combine == "direct_add" else gate.gate.weight
    x, shared, routed = inputs()
    assert_close(gate(x, shared, routed), reference.merge(combine, weight, x, shared, routed))


@pytest.mark.parametrize(("combine", "shape"), [("direct_add", None), ("cg1", (1, DIM)), ("cg2", (2, DIM))])
def test_weights_are_those_of_the_paper(combine, shape):
    shapes = [tuple(p.shape) for p in COEFFICIENT_GATES[combine](DIM).parameters()]
    assert shapes == ([] if shape is None else [shape])


def test_bounds():
    """CG-1 scales the shared expert alone, by 0 to 1; CG-2's two coefficients sum to 1."""
    x, y, zero = *inputs()[:2], torch.zeros(2, 5, DIM, dtype=torch.float64)
    cg1, cg2 = (randomise(COEFFICIENT_GATES[name](DIM).double()) for name in ("cg1", "cg2"))
    assert torch.equal(cg1(x, zero, y), y)
    scale = cg1(x, y, zero) / y
    assert (scale > 0).all() and (scale < 1).all()
    assert_close(cg2(x, y, y), y)
