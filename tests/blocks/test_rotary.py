"""Rotary positions equal the oracle's, and use exact angles in half precision.

test_reference_equality.py compares the attention that uses them with the oracle.
"""

import math

import torch

from scmoe.blocks.rotary import Rotary
from tests import reference
from tests.support.models import assert_close


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equals_the_oracle():
    x = draw(3, 12, 8)
    turned = Rotary()(x)
    assert_close(turned, torch.stack([reference.rotate(head) for head in x]))
    assert (turned[:, 1:] - x[:, 1:]).abs().max() > 0.1


def test_half_precision_is_rotated_by_exact_angles():
    """At position 1000 an angle rounded to bfloat16 would have an error of 2."""
    x = draw(1001, 8).bfloat16()
    error = (Rotary()(x).double() - Rotary()(x.double())).abs().max()
    assert Rotary()(x).dtype == torch.bfloat16 and error < 2**-7 * x.abs().max()


def test_yarn_slows_down_planes_that_turn_less_than_once_in_4096_positions():
    """Planes that turn 32 times or more are as before, and the others lie between. Peers:
    test_families.py."""
    half, factor, theta = 32, 8.0, 50000.0
    x = torch.cat(
        [torch.ones(2, half), torch.zeros(2, half)], -1
    ).double()  # a is 1 and b is 0 in each plane
    cos, sin = Rotary(theta, factor)(x)[1].split(half)
    speeds, plain = torch.atan2(sin, cos), theta ** -(torch.arange(half).double() / half)
    turns, slower = 4096 * plain / (2 * math.pi), plain / speeds
    assert_close(slower[turns >= 32], torch.ones(int((turns >= 32).sum())).double())
    assert_close(slower[turns <= 1], torch.full((int((turns <= 1).sum()),), factor).double())
    between = slower[(turns > 1) & (turns < 32)]
    assert (
        len(between) > 5 and (between.diff() > 0).all() and between[0] >= 1 and between[-1] < factor
    )
