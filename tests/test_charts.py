"""Colours of charts differ for colour-blind readers."""

from itertools import combinations

import numpy as np
from matplotlib.colors import to_rgb

from scmoe import charts


def test_colours_differ_for_colour_blind_readers():
    """As seen with protanopia and deuteranopia (Machado et al. 2009, severity 1; the matrices are
    for linear RGB)."""
    blind = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }
    colors = [to_rgb(color) for color in charts.LINES]
    for kind, matrix in blind.items():
        seen = [
            np.clip(np.array(matrix) @ np.array(color) ** 2.2, 0, 1) ** (1 / 2.2)
            for color in colors
        ]
        for a, b in combinations(seen, 2):
            assert np.abs(a - b).max() > 0.1, kind
