"""The report of `bench timeline` says how much more the shortcut overlaps than pipelining."""

import pytest

from experiments.bench.overlap.timeline import overlaps_of
from scmoe.planning.pricing import LayerChoice
from scmoe.schedule.schedule import Schedule
from tests.support.played import WINDOW_OF_50_MS


def test_each_timeline_is_compared_with_pipelined_top2():
    """Two chunks hide the experts' 10 ms; Pos-2 at slot 2 hides 25 + 10 ms of 50."""
    schedules = {"top-2": Schedule("top_k", chunks=2), "scmoe": Schedule("scmoe", "pos2", 2)}
    overlaps = overlaps_of(
        {title: LayerChoice(each, WINDOW_OF_50_MS, ()) for title, each in schedules.items()}
    )
    assert overlaps["top-2"] == {
        "beside_computation_ms": pytest.approx(10),
        "over_pipelined_top2": 1,
        "exposed_ms": pytest.approx(40),
        "eq11_ms": pytest.approx([50, 50, 50]),
    }
    assert overlaps["scmoe"] == {
        "beside_computation_ms": pytest.approx(35),
        "over_pipelined_top2": pytest.approx(3.5),
        "exposed_ms": pytest.approx(15),
        "eq11_ms": pytest.approx([0, 30, 100]),
    }
