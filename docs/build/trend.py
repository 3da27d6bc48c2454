"""The trend of quality: how the difference of two rows in loss changes with the compute of a run.

It reads the results of the tables `trend`, at its widths, and `quality`. The analysis was fixed
before the first run (docs/decisions/0049-trend-and-table-7.md): at each width the difference of
means, and over the widths a line by least squares, each width weighted by the inverse variance of
its difference.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from experiments.tables.seed_statistics import ALPHA, Values

WIDTH_RESULTS = {  # folders of docs/results, by the width of the model
    32: "trend-width-32",
    64: "quality-small",
    96: "trend-width-96",
    128: "trend-width-128",
}
COMPUTE_ROW = "top-2"  # whose compute stands for that of a width
FLOPS_OF_A_WEIGHT = 6  # forward and backward, for each token


@dataclass(frozen=True)
class TrendPoint:
    """The difference of two rows at a width.

    flops: of a training. variance: of the difference of means. degrees: of freedom, of both rows'
    variances.
    """

    width: int
    flops: float
    difference: float
    variance: float
    degrees: int


@dataclass(frozen=True)
class Slope:
    """Of a difference in loss, in nats for ten times the compute. low, high: its interval of
    95 %."""

    mean: float
    low: float
    high: float


def points_of(results: Path, row: str, baseline: str) -> list[TrendPoint]:
    """Return a row's difference to another one at each width that has results. results: a
    folder."""
    found = []
    for width, name in WIDTH_RESULTS.items():
        path = results / name / "results.json"
        if path.exists():
            table = json.loads(path.read_text(encoding="utf-8"))
            found.append(point_of(width, table, row, baseline))
    return found


def point_of(width: int, table: Mapping[str, Any], row: str, baseline: str) -> TrendPoint:
    """Return a row's difference to another one in a table's results."""
    rows = {each["name"]: each for each in table["rows"]}
    weights = rows[COMPUTE_ROW]["params_active"]
    compared, with_it = (rows[name]["ours"]["by_seed"] for name in (row, baseline))
    return TrendPoint(
        width,
        flops=FLOPS_OF_A_WEIGHT * weights * table["tokens_per_run"],
        difference=fmean(compared.values()) - fmean(with_it.values()),
        variance=variance_of_mean(compared) + variance_of_mean(with_it),
        degrees=len(compared) + len(with_it) - 2,
    )


def variance_of_mean(values: Values) -> float:
    return variance(values.values()) / len(values)


def slope(points: Sequence[TrendPoint]) -> Slope:
    """Return the slope of the difference over the logarithm of compute. ValueError: fewer than two
    widths."""
    import numpy as np
    from scipy import stats

    if len(points) < 2:
        raise ValueError(f"{len(points)} widths have results. A slope needs two")
    places = [math.log10(point.flops) for point in points]
    differences = [point.difference for point in points]
    weights = [point.variance**-0.5 for point in points]  # polyfit squares them
    (mean, _), covariance = np.polyfit(places, differences, 1, w=weights, cov="unscaled")
    degrees = sum(point.degrees for point in points)
    reach = float(stats.t.ppf(1 - ALPHA / 2, degrees)) * math.sqrt(covariance[0, 0])
    return Slope(float(mean), float(mean) - reach, float(mean) + reach)
