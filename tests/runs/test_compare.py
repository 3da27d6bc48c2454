"""Curves of runs over the seconds of their training."""

import pytest

from scmoe.runs.compare import curve_over_seconds, draw
from scmoe.runs.seen import SeenRun
from tests.support import reported


def test_seconds_are_tokens_over_logged_speeds(tmp_path):
    """10 steps of 8 sequences of 256 tokens, at 2,048 tokens/s, take 10 s."""
    run = SeenRun(reported.write_run(tmp_path))
    seconds = [second for second, _ in curve_over_seconds(run, "train/loss")]
    assert seconds == pytest.approx([10, 20, 30])
    assert curve_over_seconds(run, "val/loss") == [(pytest.approx(30), 6.25)]
    metrics = (run.path / "metrics.csv").read_text(encoding="utf-8")
    (run.path / "metrics.csv").write_text(metrics.replace(",2048", ",", 2), encoding="utf-8")
    seconds = [second for second, _ in curve_over_seconds(SeenRun(run.path), "train/loss")]
    assert seconds == pytest.approx([10, 20, 30]), "one speed is known, that of the last row"
    (run.path / "metrics.csv").write_text(metrics.replace(",2048", ","), encoding="utf-8")
    assert curve_over_seconds(SeenRun(run.path), "train/loss") == []


def test_a_dollar_sign_in_a_label_is_one(tmp_path):
    pytest.importorskip("matplotlib")
    run = SeenRun(reported.write_run(tmp_path))
    draw([run], [r"a: $\frac{a}{b$"], tmp_path / "c.png", over_seconds=True)
    assert (tmp_path / "c.png").exists()
