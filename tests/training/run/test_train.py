"""These tests run the train command: its summary, resuming and planning.

The runs are those of configs/debug.yaml, four steps each, in ranks of run_ranks. The command that
starts its ranks itself is `make train` of tests/docs/test_readme.py.
"""

import json
import math
from pathlib import Path

import pytest

from tests.support.commands import (
    EXACT,
    ROOT,
    SUMMARY,
    Done,
    column,
    resume_in_ranks,
    rows_of,
    train_in_ranks,
    undocumented,
)
from tests.terminal import shown_in, summary_rows

pytestmark = [pytest.mark.smoke, pytest.mark.ranks]
# as a command of docs/configuration.md
ON_TWO = ("trainer.devices=2", "schedule.slot=2", "schedule.chunks=2")


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> tuple[Done, Path]:
    """Return a run of two ranks with EP 2, and the folder of its runs."""
    runs = tmp_path_factory.mktemp("on_two")
    return train_in_ranks(2, "configs/debug.yaml", f"runs_dir={runs}", *ON_TWO, *EXACT), runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Done:
    """Return a run of one rank."""
    words = ("trainer.val_every=3", *EXACT)  # its last step is validated after the training
    return train_in_ranks(
        1, "configs/debug.yaml", f"runs_dir={tmp_path_factory.mktemp('alone')}", *words
    )


def test_the_last_line_is_the_summary(on_two, alone):
    for done, ranks in ((on_two[0], 2), (alone, 1)):
        summary = done.summary
        assert list(summary) == SUMMARY.split()
        assert (summary["steps"], summary["world_size"], summary["ep_size"]) == (4, ranks, ranks)
        assert all(
            isinstance(value, (int, float)) for key, value in summary.items() if key != "run_dir"
        )
        assert json.loads((done.run_dir / "summary.json").read_text()) == summary
        last = [row for row in rows_of(done.run_dir / "metrics.csv") if "val/loss" in row][-1]
        for key, name in (
            ("drop_share", "drop_share"),
            ("load_max_ratio", "load_max"),
            ("val_loss", "loss"),
        ):
            assert summary[key] == pytest.approx(float(last[f"val/{name}"]), rel=1e-5), key
        assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]), rel=1e-5)
        bits = summary["val_loss"] / math.log(2)
        assert summary["bits_per_byte"] == pytest.approx(bits, rel=1e-5), "a token is a byte"


def test_the_picture_of_the_terminal_has_the_rows_of_the_summary(on_two):
    """If this fails, `make recording` makes the picture again. Only a text has samples."""
    picture = ROOT / "docs/figures/train.svg"
    pictured = summary_rows(shown_in(picture.read_text(encoding="utf-8")))
    said = summary_rows(on_two[0].err.splitlines())
    assert "steps" in said
    assert [row for row in pictured if row != "sample"] == said


def test_the_number_of_ranks_does_not_change_the_loss(on_two, alone):
    """The bound is 1e-4; rounding in float32 leaves about 1e-6."""
    assert on_two[0].summary["val_loss"] == pytest.approx(alone.summary["val_loss"], abs=1e-4)
    assert on_two[0].summary["params_total"] == alone.summary["params_total"]


def test_resume_continues_where_the_run_stopped(on_two):
    done, runs = on_two
    run_dir = done.run_dir
    before = rows_of(run_dir / "metrics.csv")
    resumed = resume_in_ranks(2, str(runs / "latest"), "trainer.max_steps=6")
    assert (resumed.summary["steps"], resumed.run_dir) == (6, run_dir)
    assert list(runs.glob("debug/*")) == [run_dir], "there is no second run"
    after = rows_of(run_dir / "metrics.csv")
    assert after[: len(before)] == before
    assert [int(row["step"]) for row in after if "train/loss" in row] == [0, 1, 2, 3, 4, 5]
    assert "step 5/6" in resumed.err and "step 4/6" not in resumed.err


def plan(folder: Path, *settings: str) -> Done:
    words = (f"runs_dir={folder}", "trainer.devices=2", "schedule=auto", *settings)
    return train_in_ranks(2, "configs/debug.yaml", *words)


@pytest.mark.faults  # a plan: test_adaptive_schedule.py; what is logged: test_planner.py
def test_a_run_plans_its_schedule_and_logs_its_overlap(tmp_path):
    done = plan(
        tmp_path,
        "schedule.chunks=1",
        "schedule.batches_in_flight=1",
        "trainer.max_steps=57",
        "trainer.val_every=57",
        "trainer.checkpoint_every=57",
    )
    assert not undocumented(done.run_dir / "metrics.csv")
    overlaps = ("overlap/forward", "overlap/backward")
    shares = [logged for name in overlaps for logged in column(done.run_dir, name).items()]
    assert all(step >= 6 for step, _ in shares), (
        "after three steps of warm-up, three that are measured, and trials"
    )
    assert all(0 <= share <= 1.05 for _, share in shares), (
        "where they cannot be measured, they are left out"
    )
    assert "plan: MoE layer" in done.err
    assert sum(line.startswith("overlap: ") for line in done.err.splitlines()) == 1
    assert column(done.run_dir, "overlap/windows_ms") and column(
        done.run_dir, "overlap/predicted_ms"
    )


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("trainer.max_steps=2",), "trainer.max_steps"),
        (("trainer.max_steps=null", "trainer.max_tokens=128"), "trainer.max_tokens"),
    ],
)
def test_a_run_too_short_to_plan_says_so_in_one_line(words, key, tmp_path):
    done = plan(tmp_path, *words)
    (line,) = [line for line in done.err.splitlines() if "schedule: auto" in line]
    assert (
        done.code == 0
        and "may need 60 batches to choose and 2 are left" in line
        and f"Raise {key}, or" in line
        and "plan: MoE" not in done.err
    )
