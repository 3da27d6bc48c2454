"""The slope of a difference over compute is that of the registered analysis."""

import json
import math

import pytest
from matplotlib.figure import Figure

from docs.build.trend import (
    PAIRS,
    WIDTH_RESULTS,
    Trend,
    TrendPoint,
    draw,
    point_of,
    read_trends,
    slope_of,
    tables,
)
from tests.support.pictures import assert_readable

ROW, BASELINE = PAIRS["Pos-2 minus top-2"]
SHARED = PAIRS["Pos-2 minus a shared expert"][1]


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


def at(place: float, difference: float, variance: float) -> TrendPoint:
    low, high = difference - 0.01, difference + 0.01
    return TrendPoint(64, 10.0**place, difference, variance, 10, 10.0, low, high)


def test_the_slope_is_that_of_weighted_least_squares():
    """Three points with a slope of 0.05 for ten times the compute, and one, with a variance a
    million times as large, that lies far off."""
    line = [at(place, 0.05 * place, 1e-4) for place in (1, 2, 3)]
    found = slope_of([*line, at(4, 9.0, 100.0)])
    assert found.mean == pytest.approx(0.05, abs=1e-4)
    on_the_line = slope_of(line)
    assert on_the_line.mean == pytest.approx(0.05)
    # of three places 1 apart: the standard error is sqrt(1e-4 / 2); t of 30 degrees at 97.5 %
    reach = 2.042272 * math.sqrt(1e-4 / 2)
    assert on_the_line.high - on_the_line.mean == pytest.approx(reach, rel=1e-6)
    assert on_the_line.mean - on_the_line.low == pytest.approx(reach, rel=1e-6)


def test_points_that_are_on_no_line_are_named_and_their_degrees_are_those_of_the_few_seeds():
    """Of three points 1 apart with equal variances the outer two make the slope's variance."""
    line = slope_of([at(place, 0.05 * place, 1e-4) for place in (1, 2, 3)])
    assert line.p_of_line == pytest.approx(1.0)
    assert line.wider[1] - line.mean == pytest.approx(2.085963 * math.sqrt(1e-4 / 2))  # t of 20
    bent = slope_of([at(place, gain, 1e-4) for place, gain in ((1, 0.0), (2, 0.1), (3, 0.0))])
    # from the line by -1, 2 and -1 thirds of 0.1: chi squared is 0.06 / 9 / 1e-4, of one degree
    assert bent.p_of_line == pytest.approx(math.erfc(math.sqrt(0.06 / 9 / 1e-4 / 2)))
    assert slope_of([at(1, 0.0, 1e-4), at(2, 0.1, 1e-4)]).p_of_line is None


def test_a_width_without_results_is_left_out_and_one_width_has_no_slope(tmp_path):
    for width, gain in ((32, 0.1), (64, 0.2)):
        path = tmp_path / WIDTH_RESULTS[width] / "results.json"
        path.parent.mkdir()
        losses = {BASELINE: [3.0, 3.2], SHARED: [3.1, 3.2], ROW: [3.0 + gain, 3.2 + gain]}
        path.write_text(json.dumps(results(width, losses)))
    trends = read_trends(tmp_path)
    (table,) = tables(trends)
    assert [*table.columns][:3] == ["width 32", "width 64", "slope, as registered"]
    first, _ = table.cells()
    assert first[0] == "Pos-2 minus top-2" and first[1].startswith("+0.100 [")
    assert trends["Pos-2 minus top-2"].slope.mean == pytest.approx(0.1 / math.log10(2))
    with pytest.raises(ValueError, match="A slope needs two"):
        slope_of(trends["Pos-2 minus top-2"].points[:1])


def test_the_picture_is_readable(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    points = [at(14, 0.1, 1e-4), at(15, 0.05, 1e-4)]
    draw({words: Trend(points, slope_of(points)) for words in PAIRS}, tmp_path / "trend.png")
    assert_readable(figures[0])
