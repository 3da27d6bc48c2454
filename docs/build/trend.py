"""The trend of quality: how the difference of two rows in loss changes with the compute of a run.

It reads the results of the table `quality` (width 64) and of the table `trend` (the other widths).
The analysis was fixed before the first run (docs/decisions/0049-trend-and-table-7.md): at each
width the difference of means, and over the widths the slope of a line by least squares, each width
weighted by the inverse variance of its difference.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from experiments.tables.seed_statistics import ALPHA
from scmoe.charts import BLUE, PURPLE, chart, heading
from scmoe.report import Report

TREND_PAGE = "trend"  # of the page and of its picture
WIDTH_RESULTS = {  # folders of docs/results, by the width of the model
    32: "trend-width-32",
    64: "quality-small",
    96: "trend-width-96",
    128: "trend-width-128",
}
COMPUTE_ROW = "top-2"  # whose compute stands for that of a width
POS2 = "ScMoE Pos-2, CG-1"
PAIRS = {  # rows that are compared, by the words for it
    "Pos-2 minus top-2": (POS2, COMPUTE_ROW),
    "Pos-2 minus a shared expert": (POS2, "shared-expert, CG-1"),
}
PAIR_COLORS = dict(zip(PAIRS, (BLUE, PURPLE), strict=True))
FLOPS_OF_A_WEIGHT = 6  # forward and backward, for each token


@dataclass(frozen=True)
class TrendPoint:
    """The difference of two rows at a width.

    flops: of a training. variance: of the difference of means. degrees: of freedom, of both rows'
    variances. welch: those of the difference, as the rows' variances differ. low, high: Welch's
    interval of 95 % of the difference.
    """

    width: int
    flops: float
    difference: float
    variance: float
    degrees: int
    welch: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return with_interval(self.difference, self.low, self.high)


@dataclass(frozen=True)
class Slope:
    """Of a difference in loss, in nats for ten times the compute. low, high: its interval of 95 %,
    as registered.

    wider: the interval with Satterthwaite's degrees of freedom, as variances differ from width to
    width. p_of_line: how likely points as far from the line are where a line is right; None: two
    points, through which a line always goes.
    """

    mean: float
    low: float
    high: float
    wider: tuple[float, float]
    p_of_line: float | None

    @property
    def text(self) -> str:
        return with_interval(self.mean, self.low, self.high)


@dataclass(frozen=True)
class Trend:
    """Of a pair of rows."""

    points: list[TrendPoint]
    slope: Slope


def read_trends(results: Path) -> dict[str, Trend]:
    """Return the trend of each pair by its words. results: a folder. ValueError: fewer than two
    widths have results."""
    trends = {}
    for words, (row, baseline) in PAIRS.items():
        points = points_of(results, row, baseline)
        trends[words] = Trend(points, slope_of(points))
    return trends


def points_of(results: Path, row: str, baseline: str) -> list[TrendPoint]:
    """Return a row's difference to another one at each width that has results. results: a
    folder."""
    points = []
    for width, name in WIDTH_RESULTS.items():
        path = results / name / "results.json"
        if path.exists():
            table = json.loads(path.read_text(encoding="utf-8"))
            points.append(point_of(width, table, row, baseline))
    return points


def point_of(width: int, table: Mapping[str, Any], row: str, baseline: str) -> TrendPoint:
    """Return a row's difference to another one in a table's results."""
    from scipy import stats

    rows = {each["name"]: each for each in table["rows"]}
    weights = rows[COMPUTE_ROW]["params_active"]
    compared, with_it = ([*rows[name]["ours"]["by_seed"].values()] for name in (row, baseline))
    test = stats.ttest_ind(compared, with_it, equal_var=False)
    interval = test.confidence_interval(1 - ALPHA)
    return TrendPoint(
        width,
        flops=FLOPS_OF_A_WEIGHT * weights * table["tokens_per_run"],
        difference=fmean(compared) - fmean(with_it),
        variance=variance_of_mean(compared) + variance_of_mean(with_it),
        degrees=len(compared) + len(with_it) - 2,
        welch=float(test.df),
        low=float(interval.low),
        high=float(interval.high),
    )


def variance_of_mean(values: Sequence[float]) -> float:
    return variance(values) / len(values)


def slope_of(points: Sequence[TrendPoint]) -> Slope:
    """Return the slope of the difference over the logarithm of compute. ValueError: fewer than two
    widths."""
    import numpy as np
    from scipy import stats

    if len(points) < 2:
        raise ValueError(f"{len(points)} widths have results. A slope needs two")
    places = [math.log10(point.flops) for point in points]
    differences = [point.difference for point in points]
    weights = [point.variance**-0.5 for point in points]  # polyfit squares them
    (mean, at_0), covariance = np.polyfit(places, differences, 1, w=weights, cov="unscaled")
    deviation = math.sqrt(covariance[0, 0])

    def interval(degrees: float) -> tuple[float, float]:
        reach = float(stats.t.ppf(1 - ALPHA / 2, degrees)) * deviation
        return float(mean) - reach, float(mean) + reach

    from_line = [
        (point.difference - mean * place - at_0) ** 2 / point.variance
        for point, place in zip(points, places, strict=True)
    ]
    more = len(points) - 2  # points than a line needs
    return Slope(
        float(mean),
        *interval(sum(point.degrees for point in points)),
        wider=interval(degrees_of_slope(points)),
        p_of_line=float(stats.chi2.sf(sum(from_line), more)) if more else None,
    )


def degrees_of_slope(points: Sequence[TrendPoint]) -> float:
    """Return the degrees of freedom of a slope's variance (Satterthwaite 1946), which is a sum of
    the points' variances."""
    places = [math.log10(point.flops) for point in points]
    weights = [1 / point.variance for point in points]
    middle = sum(w * x for w, x in zip(weights, places, strict=True)) / sum(weights)
    parts = [w * (x - middle) ** 2 for w, x in zip(weights, places, strict=True)]
    each = zip(parts, points, strict=True)
    return sum(parts) ** 2 / sum(part**2 / point.welch for part, point in each)


def with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def tables(trends: Mapping[str, Trend]) -> list[Report]:
    """Return a table with a row for each pair, and columns for widths and for the slope."""
    rows: dict[str, dict[str, str]] = {}
    columns = {}
    for words, trend in trends.items():
        slope = trend.slope
        of_line = "-" if slope.p_of_line is None else f"{slope.p_of_line:.2g}"
        wider = "[{:+.3f}, {:+.3f}]".format(*slope.wider)
        rows[words] = {"slope": slope.text, "wider": wider, "of_line": of_line}
        for point in trend.points:
            name = f"width {point.width}"
            columns[name] = f"{{{name}}}"
            rows[words][name] = point.text
    columns |= {
        "slope, as registered": "{slope}",
        "with Satterthwaite's degrees of freedom": "{wider}",
        "p of a line": "{of_line}",
    }
    title = (
        "Differences in loss in nats per token; the slope is for ten times the compute. Intervals"
        " of 95 %, each alone. A low p of a line says that the points are on no line."
    )
    return [Report(title, rows, columns, "rows")]


def draw(trends: Mapping[str, Trend], path: Path) -> None:
    """Draw the difference of each pair over the compute of a run, with its interval."""
    with chart(path, 3.6) as figure:
        axis = figure.subplots()
        for words, trend in trends.items():
            points = trend.points
            differences = [point.difference for point in points]
            below = [point.difference - point.low for point in points]
            above = [point.high - point.difference for point in points]
            axis.errorbar(
                [point.flops for point in points],
                differences,
                (below, above),
                color=PAIR_COLORS[words],
                label=f"{words}: slope {trend.slope.text}",
                linestyle="none",
                marker="o",
                capsize=3,
            )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set(xlabel="FLOPs of a training", ylabel="difference in loss,\nnats per token")
        axis.grid()
        how = "Below 0 Pos-2 is better; a slope is for ten times the compute"
        heading(figure, f"Quality by compute\n{how}")
        figure.legend(loc="outside lower left", ncols=1)
