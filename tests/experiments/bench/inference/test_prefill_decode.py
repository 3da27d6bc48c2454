"""`bench inference` on two ranks without links measures every row in both shapes; its report has
the times' ratios."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from experiments.bench.inference import prefill_decode
from experiments.bench.inference.gains import draw, name_of_report, summary, tables, uneven_report
from experiments.bench.inference.pass_figures import SHAPES, PassFigures
from experiments.bench.inference.prefill_decode import (
    IN_TWO_BATCHES,
    MEASURED_BLOCKS,
    OVERLAPPED,
    MeasuredPasses,
    measure,
)
from experiments.bench.other_settings import InferenceSetting
from experiments.bench.pairs import default_schedule
from experiments.bench.row import from_json, to_json
from experiments.bench.stacks import Variant
from experiments.engine.ranks import run_ranks
from scmoe.loads import BALANCED, CurrentLoad, load_of
from scmoe.planning import planner
from tests.support.played import played_model

pytestmark = pytest.mark.inference
FEW = ("top2", "pos2")
ROUNDS = np.array([1.0, 1.25, 1.5])  # a machine that slows down: ratios are the same in every round
SECONDS = {"sequential": 0.2, "free": 0.1, **dict.fromkeys(OVERLAPPED, 0.16), IN_TWO_BATCHES: 0.125}


def test_ratios_are_those_of_the_times():
    """Sequential takes 0.2 s, overlapped 0.16 s, without transfers 0.1 s; generation overlaps
    prefill alone."""
    times = {}
    for block in MEASURED_BLOCKS:
        schedule = default_schedule(block)
        for shape in SHAPES:
            times |= {
                (shape, Variant(block, schedule, name)): SECONDS[name] * ROUNDS
                for name in ("sequential", *OVERLAPPED, "free")
            }
    setting = InferenceSetting(0.5, prompt=64, rounds=3)
    report = summary(MeasuredPasses(setting, 145.0, times))
    own, top2 = report["rows"]["scmoe_pos2"], report["rows"]["top2"]
    assert report["comm_share"] == {shape: pytest.approx(0.5) for shape in SHAPES}
    assert [row["speedup"] for row in (own["prefill"], own["decode"], top2["prefill"])] == [
        pytest.approx(1.25),
        1,
        pytest.approx(1.25),
    ]
    assert own["prefill"]["quartiles"] == pytest.approx([1.25, 1.25])
    assert own["prefill"]["limit"] == own["decode"]["limit"] == pytest.approx(2)
    assert (own["prefill"]["auto"], own["decode"]["auto"]) == ("overlapped x 1", "sequential")
    assert (own["prefill"]["gain"], own["decode"]["gain"]) == (pytest.approx(1.25), 1)
    assert (own["prefill"]["ms"], own["decode"]["ms"]) == (
        pytest.approx(200),
        pytest.approx(250),
    ), "medians, in ms"
    assert own["prefill"]["tokens_per_s"] == pytest.approx(2 * 64 / 0.2)
    assert own["decode"]["tokens_per_s"] == pytest.approx(2 * 8 / 0.25)


def test_rows_with_two_batches_in_flight_have_prefill_alone():
    """They take 0.125 s, and without transfers 0.11 s, as halved products cost something."""
    setting = InferenceSetting(0.5, prompt=64, texts=2, rounds=3)
    times = {}
    for block in FEW:
        schedule = default_schedule(block)
        for shape in SHAPES:
            for name in ("sequential", *OVERLAPPED, "free"):
                times[shape, Variant(block, schedule, name)] = SECONDS[name] * ROUNDS
        for name, seconds in ((IN_TWO_BATCHES, SECONDS[IN_TWO_BATCHES]), ("free", 0.11)):
            variant = Variant(block, schedule, name, batches_in_flight=2)
            times["prefill", variant] = seconds * ROUNDS
    report = summary(MeasuredPasses(setting, 145.0, times))
    assert list(report["rows"]) == ["top2", "top2_two", "scmoe_pos2", "scmoe_pos2_two"]
    top2, two = report["rows"]["top2"], report["rows"]["top2_two"]
    assert (report["texts"], report["prompt"]) == (2, 64)
    assert two["prefill"]["speedup"] == two["prefill"]["gain"] == pytest.approx(1.6)
    assert two["prefill"]["limit"] == pytest.approx(0.2 / 0.11)
    assert two["prefill"]["tokens_per_s"] == pytest.approx(2 * 128 / (0.125 * 1.25))
    assert "decode" not in two
    over = top2["prefill"]["over_best_without_another_model"]
    assert (over["best"], over["median"]) == ("top2_two, two batches", pytest.approx(0.125 / 0.16))
    assert to_json(from_json(PassFigures, two["prefill"])) == two["prefill"]
    prefill, decode = tables(report)
    assert list(prefill.rows) == list(report["rows"]) and list(decode.rows) == [
        "top2",
        "scmoe_pos2",
    ]
    assert "2 x 64 tokens a rank" in prefill.title


def test_each_pass_takes_the_next_routing_of_its_load(monkeypatch):
    dealt = []
    monkeypatch.setattr(
        prefill_decode,
        "pass_seconds",
        lambda *_: dealt.append((bench.now.load.name, bench.now.step)),
    )
    bench: Any = object.__new__(prefill_decode.InferenceBench)
    bench.now, bench.turns, bench.paid, bench.free, bench.group = (
        CurrentLoad(load_of(BALANCED)),
        Counter(),
        None,
        None,
        None,
    )
    bench.models = {"top2": played_model(default_schedule("top2"))}
    bench.passes = {("top2", "prefill"): None}
    rotating, balanced = (
        Variant("top2", default_schedule("top2"), "free", load)
        for load in ("rotating:2:1", BALANCED)
    )
    for variant in (rotating, balanced, rotating):
        bench.seconds("prefill", variant)
    assert dealt == [("rotating:2:1", 0), (BALANCED, 0), ("rotating:2:1", 1)]


def measure_briefly(rank: int, world_size: int, setting: InferenceSetting) -> Any:
    """Measure few blocks, and choose schedules from few passes: their times are not checked
    here."""
    prefill_decode.MEASURED_BLOCKS, planner.STEPS_EACH = FEW, 1
    return measure(rank, world_size, setting)


@pytest.mark.ranks
@pytest.mark.smoke
def test_all_rows_are_measured_and_reported(tmp_path):
    """With three prompts, so the halves of a rank's batch differ."""
    setting = InferenceSetting(
        0.5,
        prompt=16,
        texts=3,
        rounds=2,
        loads=("hot_rank:2",),
        dim=16,
        ffn_dim=32,
        heads=2,
        links="loopback",
    )
    found = run_ranks(measure_briefly, 2, setting)[0]
    report = summary(found[BALANCED])
    assert list(report["rows"]) == ["top2", "top2_two", "scmoe_pos2", "scmoe_pos2_two"]
    for name, row in report["rows"].items():
        in_halves = name.endswith("_two")
        for shape in SHAPES[:1] if in_halves else SHAPES:
            figures = row[shape]
            assert figures["ways"].keys() == (
                {IN_TWO_BATCHES} if in_halves else {"sequential", *OVERLAPPED}
            )
            assert min(figures["ms"], figures["limit"]) > 0
            assert set(figures["slots"].values()) <= {0, 1, 2, 3, 4}
    # `bench inference` always has links
    draw({**report, "link_mbit": 145.0}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    uneven = uneven_report(found["hot_rank:2"], found[BALANCED], "hot_rank:2")
    assert uneven["load"]["max_over_mean_ranks"] == 2.0
    for row in uneven["rows"].values():
        for figures in (row[shape] for shape in SHAPES if shape in row):
            assert figures["over_balanced"] > 0 and figures["max_over_mean_ranks"] == 2


def test_reports_of_other_settings_have_other_names():
    settings = [
        InferenceSetting(),
        InferenceSetting(prompt=3072),
        InferenceSetting(texts=2),
        InferenceSetting(batch=16),
        InferenceSetting(loads=("hot_rank:2",)),
    ]
    assert len({name_of_report(setting) for setting in settings}) == len(settings)
