"""`bench inference` on two ranks without links: every row is measured in both shapes, and its report is whole."""

from typing import Any
from unittest.mock import patch

import pytest

from scmoe.experiments.bench.inference import BLOCKS, SHAPES, WAYS, draw, measure, summary
from scmoe.experiments.bench.pairs import Setting
from scmoe.experiments.engine.ranks import run_ranks
from scmoe.planning import inference_planner

pytestmark = [pytest.mark.dist, pytest.mark.smoke, pytest.mark.inference]


def measure_briefly(rank: int, world_size: int, setting: Setting, batch: int) -> Any:
    """Plans from few passes: a plan's times are not looked at here."""
    with patch.multiple(inference_planner, ROUNDS=2):
        return measure(rank, world_size, setting, batch)


def test_all_rows_are_measured_and_reported(tmp_path):
    setting = Setting(0.5, compute="real", rounds=2, dim=16, ffn_dim=32, heads=2, tokens=16, seq_len=16, shaped=False)
    found = run_ranks(measure_briefly, 2, setting, 8)[0]
    report = summary(setting, 8, 2, found)
    assert len(report["rows"]) == len(BLOCKS)
    for row in report["rows"].values():
        for shape in SHAPES:
            own = row[shape]
            assert (
                set(own["ways"]) == set(WAYS)
                and own["ms"] > 0
                and own["limit"] > 0
                and set(own["slots"].values()) <= {0, 1, 2, 3, 4}
            )
    draw({**report, "link_mbit": 145.0}, tmp_path / "chart.png")  # `bench inference` always has links
    assert (tmp_path / "chart.png").stat().st_size > 10_000
