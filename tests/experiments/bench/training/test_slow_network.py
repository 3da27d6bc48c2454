"""The bench of trainings on a slow network runs, and refuses what it cannot measure."""

import numpy as np
import pytest

from experiments.bench.other_settings import TrainingSetting
from experiments.bench.training import slow_network
from experiments.engine import links
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from tests.support.commands import called, run

pytestmark = [pytest.mark.ranks, pytest.mark.smoke]
MISSING = links.why_not()
on_links = pytest.mark.skipif(MISSING is not None, reason=f"links cannot be shaped here: {MISSING}")


@pytest.mark.faults
@on_links
def test_bench_train(tmp_path):
    """Both rows train the debug configuration on the links and without a rate. How long two batches
    in flight wait for rows alone is not known."""
    words = (
        "trainer.max_steps=120",
        "trainer.log_every=2",
        "trainer.val_every=60",
        "data.name=synthetic",
    )
    rows = ("--rows", "top2_two", "--rows", "scmoe_pos2", "--rounds", "2", "--out", str(tmp_path))
    report = run("-m", "experiments.bench", "train", "--config", "debug", *rows, *words).summary
    assert list(report["rows"]) == ["top2_two", "scmoe_pos2"]
    two = report["rows"]["top2_two"]
    assert two["speedup"] == 1.0 and "exposed_rows_s" not in two
    for row in report["rows"].values():
        assert row["compute_s"] + row["exposed_s"] == pytest.approx(row["step_s"])
        if "exposed_rows_s" in row:
            parts = row["exposed_rows_s"] + row["exposed_gradients_s"]
            assert parts == pytest.approx(row["exposed_s"])
        assert row["rows_over_gradients"] > 0 and row["peak_mb"] > 0
        assert len(row["val_losses"]) == 2 and row["val_losses"][-1][1] == row["val_loss"]
    (picture,) = tmp_path.glob("*.png")
    assert picture.name.startswith("train-two-batches-share-0.52-config-debug-")


def test_bench_train_takes_as_many_ranks_as_share_the_experts_of_its_config(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(links, "require", lambda: None)
    monkeypatch.setattr(slow_network, "bench_train", lambda *args: given.append(args))
    assert called("bench", "train", "moe.num_experts=6", "--ranks", "3").code == 0
    assert given[0][:2] == (TrainingSetting(ranks=3), ("moe.num_experts=6",))


@pytest.mark.parametrize(
    ("config", "words", "says"),
    [
        ("debug", ("trainer.early_stopping=1",), "early_stopping"),
        ("quickstart_vision", (), r"model.family is swin, allowed: gpt \| llama, as speeds are in"),
        (
            "debug",
            ("trainer.max_steps=117",),
            "60 steps to choose, and 59 come before the timed ones. Give trainer.max_steps=120",
        ),
        (
            "debug",
            ("trainer.max_steps=100", "trainer.accumulate=2"),
            "54 steps to choose, and 50 come before the timed ones. Give trainer.max_steps=108",
        ),
    ],
)
def test_bench_train_refuses_what_it_cannot_compare(config, words, says, tmp_path, monkeypatch):
    monkeypatch.setattr(slow_network, "measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(ConfigError, match=says):
        setting = TrainingSetting(config, rounds=2, rows=("top2", "scmoe_pos2"))
        slow_network.bench_train(setting, words, tmp_path)


def test_a_turn_without_a_logged_step_leaves_the_exposed_rows_of_the_others():
    """The windows take 0.4 s longer on the links in the two turns where they are measured."""
    steps, windows = np.array([[2.0, 2.0, 3.0], [1.0, np.nan, 1.0]])
    row, first = "scmoe_pos2", ("scmoe_pos2", slow_network.LINKS)
    times = {
        first: np.stack([steps, windows]),
        (row, slow_network.WITHOUT_RATE): np.stack([steps - 1, windows - 0.4]),
    }
    results = {first: {"curve": [(64, 5.0)], "peak_mb": 1.0}}
    measured = slow_network.MeasuredTrainings(100.0, times, results)
    config = load_config("debug", ["trainer.devices=2", "strategy.ep_size=2"])
    found = slow_network.trained_row(config, measured, row, row)
    assert found.exposed_s == pytest.approx(1.0)
    assert found.exposed_rows_s == pytest.approx(0.4)
    assert found.exposed_gradients_s == pytest.approx(0.6)


def test_reports_of_other_trainings_have_other_names():
    asked = [
        (TrainingSetting(), []),
        (TrainingSetting(ranks=4), []),
        (TrainingSetting("debug"), []),
        (TrainingSetting(), ["model.dim=512"]),
        (TrainingSetting(), ["model.dim=256"]),
    ]
    names = {slow_network.name_of_report(*each) for each in asked}
    assert len(names) == len(asked)
    assert "train-share-0.52" in names


def test_the_chart_of_a_load_says_that_its_losses_mean_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(slow_network, "heading", lambda figure, words: said.append(words))
    numbers = ("tokens_per_s", "speedup", "step_s", "compute_s", "rows_over_gradients", "val_loss")
    row = dict.fromkeys(numbers, 1.0)
    row |= {"quartiles": [1.0, 1.0], "val_losses": [[1.0, 5.0], [2.0, 4.0]]}
    report = {"config": "debug", "ranks": 2, "link_mbit": 100.0, "rows": {"top2": row}}
    slow_network.draw(report, tmp_path / "own.png")
    slow_network.draw(report | {"load": {"name": "hot_rank:1.7"}}, tmp_path / "load.png")
    own, at_load = said
    assert own.endswith("Mbit/s")
    assert "hot_rank:1.7" in at_load and "losses mean nothing" in at_load
