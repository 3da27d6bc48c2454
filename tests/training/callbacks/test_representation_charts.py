"""The chart of similarities has a panel for each width."""

import numpy as np

from scmoe.training.callbacks.representation_charts import draw_similarity


def test_draws_a_panel_for_each_width(tmp_path):
    values = np.full((2, 5, 5), np.nan)
    values[:, :2, :2], values[:, 2:, 2:] = 0.9, -0.2
    labels = ["input", "0 attention", "input", "1 attention", "1 MoE"]
    draw_similarity([0, 10], labels, values, tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
