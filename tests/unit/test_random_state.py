"""A rank's generators (torch, Python, NumPy) continue from their saved states, whose shapes never change."""

import random

import numpy as np
import pytest
import torch

from scmoe.parallel.checkpoint.state import rng_states, set_rng_states


def draw():
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


@pytest.mark.parametrize("normals", [0, 1])  # normals are drawn in pairs, and the generator keeps the second
def test_restored_generators_draw_the_same_numbers(normals):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    for _ in range(normals):
        draw()
    states = {name: state.clone() for name, state in rng_states().items()}
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    later = rng_states()
    for name, state in states.items():  # a reader of a checkpoint allocates by these shapes
        assert (state.shape, state.dtype) == (later[name].shape, later[name].dtype)
    set_rng_states(states)
    assert [draw() for _ in range(3)] == expected
