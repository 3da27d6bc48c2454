"""`bench inference` on two ranks without links measures every row in both shapes; its report has
the times' ratios."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.bench.inference import generation, inference
from experiments.bench.inference.inference import (
    BLOCKS,
    ONE_BATCH,
    OVERLAPPED,
    TWO_BATCHES,
    measure,
)
from experiments.bench.inference.inference_report import at_load, draw, summary, tables
from experiments.bench.inference.inference_rows import SHAPES, InferenceRow
from experiments.bench.pairs import Setting, default_schedule
from experiments.bench.stacks import Variant
from experiments.engine.ranks import run_ranks
from scmoe.loads import BALANCED, CurrentLoad, load_of
from scmoe.planning import planner

pytestmark = pytest.mark.inference
FEW = ("top2", "pos2")
ROUNDS = np.array([1.0, 1.25, 1.5])  # a machine that slows down: ratios are the same in every round
SECONDS = {"sequential": 0.2, "free": 0.1, **dict.fromkeys(OVERLAPPED, 0.16), TWO_BATCHES: 0.125}


def test_ratios_are_those_of_the_times():
    """Sequential takes 0.2 s, overlapped 0.16 s, without transfers 0.1 s; generation overlaps
    prefill alone."""
    times = {}
    for block in BLOCKS:
        schedule = default_schedule(block)
        for shape in SHAPES:
            times |= {
                (shape, Variant(block, schedule, name)): SECONDS[name] * ROUNDS
                for name in (*ONE_BATCH, "free")
            }
    setting = Setting(0.5, tokens=64, seq_len=64, rounds=3)
    report = summary(setting, 8, {"times": times, "rate": 145.0})
    own, top2 = report["rows"]["scmoe_pos2"], report["rows"]["top2"]
    assert report["comm_share"] == {shape: pytest.approx(0.5) for shape in SHAPES}
    assert (own["prefill_speedup"], own["decode_speedup"], top2["prefill_speedup"]) == (
        pytest.approx(1.25),
        1,
        pytest.approx(1.25),
    )
    assert own["prefill"]["quartiles"] == pytest.approx([1.25, 1.25])
    assert own["prefill"]["limit"] == own["decode"]["limit"] == pytest.approx(2)
    assert (own["prefill"]["auto"], own["decode"]["auto"]) == ("overlapped x 1", "sequential")
    assert (own["prefill"]["gain"], own["decode"]["gain"]) == (pytest.approx(1.25), 1)
    assert (own["ttft_ms"], own["tpot_ms"]) == (pytest.approx(200), pytest.approx(250)), (
        "medians, in ms"
    )
    assert own["prefill_tokens_per_s"] == pytest.approx(2 * 64 / 0.2)
    assert own["decode_tokens_per_s"] == pytest.approx(2 * 8 / 0.25)


def test_rows_with_two_batches_in_flight_have_prefill_alone():
    """They take 0.125 s, and without transfers 0.11 s, as halved products cost something."""
    setting = Setting(0.5, tokens=128, seq_len=64, rounds=3)
    times = {}
    for block in FEW:
        schedule = default_schedule(block)
        for shape in SHAPES:
            for name in (*ONE_BATCH, "free"):
                times[shape, Variant(block, schedule, name)] = SECONDS[name] * ROUNDS
        for name, seconds in ((TWO_BATCHES, SECONDS[TWO_BATCHES]), ("free", 0.11)):
            variant = Variant(block, schedule, name, batches_in_flight=2)
            times["prefill", variant] = seconds * ROUNDS
    report = summary(setting, 8, {"times": times, "rate": 145.0})
    assert list(report["rows"]) == ["top2", "top2_two", "scmoe_pos2", "scmoe_pos2_two"]
    top2, two = report["rows"]["top2"], report["rows"]["top2_two"]
    assert (two["batches_in_flight"], top2["batches_in_flight"]) == (2, 1)
    assert (report["texts"], report["prompt"]) == (2, 64)
    assert two["prefill_speedup"] == two["prefill"]["gain"] == pytest.approx(1.6)
    assert two["prefill"]["limit"] == pytest.approx(0.2 / 0.11)
    assert two["prefill_tokens_per_s"] == pytest.approx(2 * 128 / (0.125 * 1.25))
    assert "decode" not in two and "tpot_ms" not in two
    over = top2["prefill"]["over_best_without_another_model"]
    assert (over["best"], over["median"]) == ("top2_two, two batches", pytest.approx(0.125 / 0.16))
    assert InferenceRow.from_json(two).to_json() == two
    prefill, decode = tables(report)
    assert list(prefill.rows) == list(report["rows"]) and list(decode.rows) == [
        "top2",
        "scmoe_pos2",
    ]
    assert "2 x 64 tokens a rank" in prefill.title


def test_each_pass_takes_the_next_routing_of_its_load(monkeypatch):
    dealt = []
    monkeypatch.setattr(
        inference, "pass_seconds", lambda *_: dealt.append((bench.now.load.name, bench.now.step))
    )
    bench: Any = object.__new__(inference.InferenceBench)
    bench.now, bench.turns, bench.paid, bench.free, bench.group = (
        CurrentLoad(load_of(BALANCED)),
        Counter(),
        None,
        None,
        None,
    )
    bench.models = {"top2": SimpleNamespace(blocks=[SimpleNamespace(run_as=lambda *_: None)])}
    bench.passes = {("top2", "prefill"): None}
    rotating, balanced = (
        Variant("top2", default_schedule("top2"), "free", load)
        for load in ("rotating:2:1", BALANCED)
    )
    for variant in (rotating, balanced, rotating):
        bench.seconds("prefill", variant)
    assert dealt == [("rotating:2:1", 0), (BALANCED, 0), ("rotating:2:1", 1)]


def measure_briefly(rank: int, world_size: int, setting: Setting, batch: int) -> Any:
    """Measure few blocks, and choose schedules from few passes: their times are not checked
    here."""
    inference.BLOCKS, planner.STEPS_EACH = FEW, 1
    return measure(rank, world_size, setting, batch)


@pytest.mark.ranks
@pytest.mark.smoke
def test_all_rows_are_measured_and_reported(tmp_path):
    """With three prompts, so the halves of a rank's batch differ."""
    setting = Setting(
        0.5,
        compute="real",
        rounds=2,
        dim=16,
        ffn_dim=32,
        heads=2,
        tokens=48,
        seq_len=16,
        shaped=False,
    )
    setting = replace(setting, loads=("hot_rank:2",), layout="dropless")
    found = run_ranks(measure_briefly, 2, setting, 8)[0]
    report = summary(setting, 8, found[BALANCED])
    assert list(report["rows"]) == ["top2", "top2_two", "scmoe_pos2", "scmoe_pos2_two"]
    for name, row in report["rows"].items():
        in_halves = name.endswith("_two")
        for shape in SHAPES[:1] if in_halves else SHAPES:
            figures = row[shape]
            assert figures["ways"].keys() == ({TWO_BATCHES} if in_halves else set(ONE_BATCH))
            assert min(figures["ms"], figures["limit"]) > 0
            assert set(figures["slots"].values()) <= {0, 1, 2, 3, 4}
    draw(
        {**report, "link_mbit": 145.0}, tmp_path / "chart.png"
    )  # `bench inference` always has links
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    uneven = at_load(setting, 8, found, "hot_rank:2")
    assert uneven["load"]["max_over_mean_ranks"] == 2.0
    for row in uneven["rows"].values():
        for figures in (row[shape] for shape in SHAPES if shape in row):
            assert figures["over_balanced"] > 0 and figures["max_over_mean_ranks"] == 2


@pytest.mark.smoke
def test_generation_with_a_cache_and_without_gives_the_same_tokens_and_a_table():
    """`measure` raises where a token differs."""
    report = generation.measure(0, 1, tokens=6, rounds=2).report()
    assert report["decode_over_operators"] > 1
    assert min(report[name] for name in generation.WORDS) > 0
    assert {"shared_expert", "head"} <= report["operators_ms"].keys()
    figures, operators = generation.tables(report)
    assert "a decoding step, ms" in figures.markdown() and "head" in operators.markdown()
