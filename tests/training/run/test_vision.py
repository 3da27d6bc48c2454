"""These tests run the vision quickstart on two ranks: its last line, the best checkpoint, missing
data."""

import pytest

from tests.support.commands import (
    SUMMARY,
    Done,
    column,
    command_in_ranks,
    train_in_ranks,
    undocumented,
)

pytestmark = [pytest.mark.smoke, pytest.mark.ranks]

SHORT = (
    "model.layers=2",
    "trainer.max_steps=4",
    "trainer.val_every=2",
    "trainer.checkpoint_every=2",
    "data.val_sequences=21",
    "data.global_batch_size=16",
    "logger.mode=disabled",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Done:
    words = (f"runs_dir={tmp_path_factory.mktemp('vision')}", *SHORT, "trainer.log_every=1")
    return train_in_ranks(2, "configs/quickstart_vision.yaml", *words)


def test_the_last_line_is_the_summary(trained):
    summary = trained.summary
    assert list(summary) == [*SUMMARY.split(), "val_accuracy", "data", "images_per_s"]
    assert summary["bits_per_byte"] is None and summary["unigram_bits_per_byte"] is None, (
        "images have no bytes"
    )
    assert summary["perplexity"] is None, "images have no next token"
    assert summary["tokens_per_s"] == pytest.approx(64 * summary["images_per_s"]), (
        "16 x 16 pixels have 64 patches of 2 x 2"
    )
    assert (summary["data"], summary["steps"], summary["ep_size"], summary["world_size"]) == (
        "digits",
        4,
        2,
        2,
    )
    share = summary["val_accuracy"] * 21
    assert share == pytest.approx(round(share), abs=1e-4), (
        "the accuracy counts 21 images on two ranks, and no filler"
    )


def test_the_best_checkpoint_has_the_highest_accuracy(trained):
    accuracies = column(trained.run_dir, "val/accuracy")
    assert sorted(accuracies) == [1, 3]
    assert not undocumented(trained.run_dir / "metrics.csv")
    (best,) = (trained.run_dir / "checkpoints").glob("best-*.ckpt")
    assert accuracies[int(best.stem.partition("step=")[2]) - 1] == max(accuracies.values())


def test_missing_data_is_an_error(tmp_path):
    words = ("data.path=nowhere", f"runs_dir={tmp_path}", "logger.mode=disabled")
    done = train_in_ranks(2, "configs/quickstart_fashion.yaml", *words)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert (
        line.startswith("error: ")
        and "dataset-fashion-mnist" in line
        and "data.name=digits" in line
    )


@pytest.mark.faults
def test_images_are_evaluated_on_the_whole_split_and_refuse_tasks(trained):
    run_dir = trained.summary["run_dir"]
    alone = command_in_ranks("evaluate", 1, run_dir).summary
    assert alone == command_in_ranks("evaluate", 2, run_dir, "trainer.devices=2").summary
    assert (alone["test"]["images"], alone["test"]["split"]) == (360, "val"), (
        "every fifth of 1,797 digits"
    )
    assert (alone["perplexity"], alone["tasks"]) == (None, {})
    assert alone["test_loss"] == alone["test"]["loss"] > 0
    for option, value in (("--tasks", "piqa"), ("--limit", "5"), ("--stride", "5")):
        refused = command_in_ranks("evaluate", 1, run_dir, option, value)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert f"{option} needs a run on text; this one has data.name=digits" in refused.err
