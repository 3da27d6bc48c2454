"""The slope of a difference over compute is that of the registered analysis."""

import json
import math

import pytest

from docs.build.trend import WIDTH_RESULTS, TrendPoint, point_of, points_of, slope

ROW, BASELINE = "ScMoE Pos-2, CG-1", "top-2"


def results(weights: int, by_row: dict[str, list[float]]) -> dict:
    rows = [
        {
            "name": name,
            "params_active": weights,
            "ours": {"by_seed": {str(seed): loss for seed, loss in enumerate(losses, 1)}},
        }
        for name, losses in by_row.items()
    ]
    return {"rows": rows, "tokens_per_run": 1000}


def test_a_point_has_the_difference_of_means_its_variance_and_the_compute():
    table = results(50, {BASELINE: [3.0, 3.2], ROW: [3.1, 3.3, 3.5]})
    point = point_of(64, table, ROW, BASELINE)
    assert point.difference == pytest.approx(0.2)
    assert point.variance == pytest.approx(0.02 / 2 + 0.04 / 3)
    assert (point.degrees, point.flops) == (3, 6 * 50 * 1000)


def test_the_slope_is_that_of_weighted_least_squares():
    """Three points with a slope of 0.05 for ten times the compute, and one, with a variance a
    million times as large, that lies far off."""
    line = [TrendPoint(i, 10.0**i, 0.05 * i, 1e-4, 10) for i in (1, 2, 3)]
    found = slope([*line, TrendPoint(4, 1e4, 9.0, 100.0, 10)])
    assert found.mean == pytest.approx(0.05, abs=1e-4)
    on_the_line = slope(line)
    assert on_the_line.mean == pytest.approx(0.05)
    # of three places 1 apart: the standard error is sqrt(1e-4 / 2); t of 30 degrees at 97.5 %
    reach = 2.042272 * math.sqrt(1e-4 / 2)
    assert on_the_line.high - on_the_line.mean == pytest.approx(reach, rel=1e-6)
    assert on_the_line.mean - on_the_line.low == pytest.approx(reach, rel=1e-6)


def test_widths_without_results_are_left_out_and_one_width_has_no_slope(tmp_path):
    for width in (32, 64):
        path = tmp_path / WIDTH_RESULTS[width] / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(results(width, {BASELINE: [3.0, 3.2], ROW: [3.1, 3.3]})))
    points = points_of(tmp_path, ROW, BASELINE)
    assert [point.width for point in points] == [32, 64]
    with pytest.raises(ValueError, match="A slope needs two"):
        slope(points[:1])
