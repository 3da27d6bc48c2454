"""The table of the gradients by depth shows norms over those at the last representation."""

import json

import numpy as np

from experiments.figures import gradients
from experiments.figures.gradients import GRADIENT_ROWS, SEEDS, measure_gradients, tables


def test_norms_are_shown_over_those_at_the_last_representation():
    """Two seeds, two steps and three representations."""
    norms = [[[3.0, 2.0, 1.0], [4.0, 1.0, 2.0]], [[5.0, 2.0, 1.0], [6.0, 1.0, 2.0]]]
    report = {"seeds": (1, 2), "steps": [0, 60], "labels": ["a", "b", "c"], "norms": {"x": norms}}
    (table,) = tables(report)
    assert table.cells() == [["x", "1.00 to 5.00", "2.00 to 3.00", "1.00 to 1.00"]]


def test_every_row_is_trained_with_every_seed(tmp_path, monkeypatch):
    """A training leaves norms of its own, by its seed and its position in the order."""
    trained = []

    def train(config):
        run = tmp_path / str(len(trained))
        (run / "analysis").mkdir(parents=True)
        trained.append((config.moe.architecture, config.moe.position, config.seed))
        values = np.full((2, 3, 1), len(trained), dtype=float)
        np.savez(
            run / "analysis" / "gradients.npz", steps=[0, 60], labels=list("abc"), values=values
        )
        return run

    monkeypatch.setattr(gradients, "train_from_python", train)
    report = measure_gradients(tmp_path)
    assert len(set(trained)) == len(trained) == len(GRADIENT_ROWS) * len(SEEDS)
    assert trained[:3] == [("top_k", "pos2", 1), ("shared_expert", "pos2", 1), ("scmoe", "pos1", 1)]
    assert report["norms"]["ScMoE Pos-1"] == [[[n] * 3] * 2 for n in (3, 8, 13)]
    stored = json.loads((tmp_path / "gradients.json").read_text())
    assert stored["norms"] == report["norms"] and (tmp_path / "gradients.png").exists()
