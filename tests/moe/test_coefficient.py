"""The weights of Direct Add, CG-1 and CG-2 (Eq. 14-16). test_reference_equality.py compares what
they compute."""

import pytest

from scmoe.moe.coefficient import COEFFICIENT_GATES

DIM = 16


@pytest.mark.parametrize(
    ("combine", "shapes"), [("direct_add", []), ("cg1", [(1, DIM)]), ("cg2", [(2, DIM)])]
)
def test_weights_are_those_of_the_paper(combine, shapes):
    assert [tuple(p.shape) for p in COEFFICIENT_GATES[combine](DIM).parameters()] == shapes
