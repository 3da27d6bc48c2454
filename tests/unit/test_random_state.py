"""A rank's generators go on where they were, whichever library draws: torch, Python, NumPy."""

import random

import numpy as np
import pytest
import torch

from scmoe.parallel.checkpoint.state import rng_states, set_rng_states


def draw():
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


@pytest.mark.parametrize("normals", [0, 1])  # normals are drawn in pairs, of which one is kept
def test_what_is_drawn_next_is_the_same(normals):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    for _ in range(normals):
        draw()
    states = {name: state.clone() for name, state in rng_states().items()}
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    set_rng_states(states)
    assert [draw() for _ in range(3)] == expected


def test_shapes_never_change():
    """So that a reader knows what to allocate."""
    shapes = []
    for _ in range(3):
        shapes.append({name: (state.shape, state.dtype) for name, state in rng_states().items()})
        draw()
    assert shapes[0] == shapes[1] == shapes[2]
