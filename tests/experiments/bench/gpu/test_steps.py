"""The GPU check keeps to nine minutes and to its files' limits, and reads profiles of a card.

No card is needed: the profile is written by hand in the form in which torch exports one.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.bench.gpu import check, steps
from experiments.engine.isolated import Place
from scmoe.schedule.play import Span


def test_all_clocks_together_leave_half_a_minute_of_nine():
    assert sum(part.clock_s for part in check.CHECK_PARTS.values()) <= 9 * 60 - 30


@pytest.mark.parametrize("tiny", [False, True])
def test_models_train_on_one_device_in_bfloat16(tiny):
    place = Place("cpu", tiny, Path())
    small = steps.shipped_config(place, steps.GPT2_CONFIG, "data.name=synthetic")
    quick = steps.shipped_config(place, "quickstart.yaml", "data.name=text", "data.path=docs")
    for config in (small, quick):
        assert (config.trainer.precision, config.trainer.devices, config.strategy.ep_size) == (
            "bf16-mixed",
            1,
            1,
        )
    assert (small.model.dim, small.data.seq_len) == ((48, 32) if tiny else (768, 1024))


def test_beside_is_the_share_of_transfers_in_which_an_operator_computes():
    spans = [
        Span("dispatch", 0, 4),
        Span("attention", 1, 3),
        Span("experts", 4, 6),
        Span("combine", 6, 10),
    ]
    assert steps.share_beside_computation(spans) == 2 / 8


def test_without_matplotlib_the_missing_picture_is_said(monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    said = steps.drawn(lambda *_: pytest.fail("drawn"), {}, Path("a.png"))
    assert said == "not drawn: matplotlib is missing"


def test_the_largest_files_go_until_the_limits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TOTAL_MB", 5.001)
    for i, size in enumerate((10, 20, 30, 400, 500, 600, 700, 2000)):
        (tmp_path / f"{i}.png").write_bytes(bytes(size))
    removed = check.trim(tmp_path)
    assert [line.split(",")[0] for line in removed] == ["7.png", "6.png", "5.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "4.png",
    ]


def test_the_timelines_are_asked_for_as_the_bench_measures_them(tmp_path, monkeypatch):
    spans = [Span("attention", 0, 2), Span("dispatch", 1, 2)]

    def alone(measure, *words):
        asked = inspect.signature(measure).bind(0, 1, *words).arguments
        (asked["out"] / steps.KEPT_TRACE).write_text("{}", encoding="utf-8")
        return 0.5, {kind: {"a: measured": spans} for kind in ("forward", "backward")}, {}

    monkeypatch.setattr(steps, "run_alone", alone)
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    facts = steps.timelines(Place("cpu", True, tmp_path))
    assert facts["bus_rate"] == 0.5
    assert facts["backward"] == {"a: measured": {"ms": 2, "beside": 1.0}}
    assert (tmp_path / "pair.json.gz").exists()


def test_a_missing_package_is_named():
    """Before a part starts, and where a file of tests cannot be imported."""
    of_models = {"greenlet", "lightning", "safetensors", "torchmetrics"}
    for name, part in check.CHECK_PARTS.items():
        assert of_models <= {*part.packages}, name
        assert name == "layer" or "omegaconf" in part.packages, name
    outcomes = check.Outcomes()
    reason = "E   ModuleNotFoundError: No module named 'greenlet'"
    for file, failed in (("a.py", True), ("b.py", False)):
        outcomes.pytest_collectreport(
            SimpleNamespace(nodeid=file, failed=failed, outcome="failed", longrepr=reason)
        )
    assert {file: report.longrepr for file, report in outcomes.of.items()} == {"a.py": reason}
