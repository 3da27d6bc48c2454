"""The vision quickstart as a command: two ranks on the digits, its last line, the best checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.commands import ROOT, SUMMARY, TRAIN, Done, rows_of, run

pytestmark = [pytest.mark.smoke, pytest.mark.dist]

SHORT = ("trainer.max_steps=4", "trainer.val_every=2", "trainer.checkpoint_every=2", "data.val_sequences=21")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Done, Path]:
    runs = tmp_path_factory.mktemp("vision")
    done = run(*TRAIN, "configs/quickstart_vision.yaml", f"runs_dir={runs}", *SHORT, "trainer.log_every=1")
    return done, runs


def test_the_last_line_is_the_summary(trained):
    summary = trained[0].summary
    assert list(summary) == [*SUMMARY.split(), "val_accuracy", "data", "images_per_s"]
    assert summary["bits_per_byte"] is None and summary["unigram_bits_per_byte"] is None, "pictures have no bytes"
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]), rel=1e-6)  # float32
    assert summary["tokens_per_s"] == pytest.approx(64 * summary["images_per_s"]), "patches of 2 x 2 in 16 x 16"
    assert (summary["data"], summary["steps"], summary["ep_size"], summary["world_size"]) == ("digits", 4, 2, 2)
    share = summary["val_accuracy"] * 21
    assert share == pytest.approx(round(share), abs=1e-4), "21 pictures on two ranks, filler left out"


def test_the_best_checkpoint_goes_by_accuracy(trained):
    done, _ = trained
    run_dir = ROOT / done.summary["run_dir"]
    accuracies = {
        int(row["step"]) + 1: float(row["val/accuracy"])
        for row in rows_of(run_dir / "metrics.csv")
        if "val/accuracy" in row
    }
    assert sorted(accuracies) == [2, 4]
    (best,) = (run_dir / "checkpoints").glob("best-*.ckpt")
    assert accuracies[int(best.stem.partition("step=")[2])] == max(accuracies.values())


def test_data_that_is_not_there_is_an_error(tmp_path):
    """Nothing stands in for it."""
    words = ("data.path=nowhere", f"runs_dir={tmp_path}", "logger.mode=disabled")
    done = run(*TRAIN, "configs/quickstart_fashion.yaml", *words)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and "dataset-fashion-mnist" in line and "data.name=digits" in line
