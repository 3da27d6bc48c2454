"""Rotary positions depend only on distances, keep lengths, and use exact angles in half precision.

test_reference_equality.py compares the attention that uses them with the oracle.
"""

from __future__ import annotations

import torch

from scmoe.blocks.sublayers import Rotary
from tests import reference
from tests.support.models import assert_close


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equals_the_oracle_and_keeps_lengths():
    x = draw(3, 12, 8)
    turned = Rotary()(x)
    assert_close(turned, torch.stack([reference.rotate(head) for head in x]))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned[:, 1:] - x[:, 1:]).abs().max() > 0.1


def test_a_score_depends_only_on_the_distance():
    q, k = draw(2, 8)
    match = Rotary()(q.expand(20, 8)) @ Rotary()(k.expand(20, 8)).T  # score of q at s and k at t
    for distance in range(20):
        diagonal = match.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert match[0].std() > 0.1


def test_half_precision_is_rotated_by_exact_angles():
    """At position 1000 an angle rounded to bfloat16 would have an error of 2."""
    x = draw(1001, 8).bfloat16()
    error = (Rotary()(x).double() - Rotary()(x.double())).abs().max()
    assert Rotary()(x).dtype == torch.bfloat16 and error < 2**-7 * x.abs().max()
