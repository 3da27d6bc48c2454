"""Means of a table's rows over seeds, their differences to a baseline row, and how many seeds a difference needs.

A difference is taken seed by seed, since rows with the same seed see the same data and start with the same weights; the
test is Student's t on these differences, two-sided. A table compares several rows, so its numbers are corrected:

    p          Holm's step-down correction over the table's comparisons
    low, high  Bonferroni's simultaneous intervals: each at 1 - 0.05 / comparisons, together they hold at 95 %

Holm decides a little more than Bonferroni, so a difference can be decided while its interval just touches 0.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import median
from typing import Any

import numpy

ALPHA, POWER = 0.05, 0.8
FAR_DEVIATIONS, FAR_SHARE = 5, 0.01  # a value is far from its median beyond 5 MAD, and beyond 1 % of the median
MOST_SEEDS = 10_000
MOST_ORDERED = 8  # rows of which all orders are counted
ROUNDING = 1e-9  # differences that vary by less than this share of the values are equal


def describe(values: Mapping[int, float]) -> dict[str, Any]:
    """Return mean, std (of a sample; None for one value), n, median and range of values by seed.

    far: how many values are more than 5 median absolute deviations, and more than 1 % of the median, from the median.
    """
    n, all_values = len(values), list(values.values())
    if n == 0:
        return {"mean": None, "std": None, "n": 0, "median": None, "range": None, "far": 0}
    mean, middle = math.fsum(all_values) / n, median(all_values)
    squares = math.fsum((value - mean) ** 2 for value in all_values)
    distances = [abs(value - middle) for value in all_values]
    allowed = max(FAR_DEVIATIONS * median(distances), FAR_SHARE * abs(middle))
    return {
        "mean": mean,
        "std": math.sqrt(squares / (n - 1)) if n > 1 else None,
        "n": n,
        "median": middle,
        "range": [min(all_values), max(all_values)],
        "far": sum(distance > allowed for distance in distances),
    }


def compare(values: Mapping[int, float], baseline: Mapping[int, float], comparisons: int = 1) -> dict[str, Any]:
    """Return the differences over the seeds that both have: mean, std, n, interval (low, high), p and by_seed.

    comparisons: of the table, by which the interval is widened; p is corrected by `holm`, over all rows at once.
    low, high and p are None for fewer than two pairs and for differences that are all equal.
    """
    from scipy import stats

    by_seed = {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}
    facts = describe(by_seed)
    found = {name: facts[name] for name in ("mean", "std", "n")} | {"low": None, "high": None, "p": None}
    spread = max(by_seed.values(), default=0.0) - min(by_seed.values(), default=0.0)
    # accuracies have few values: their differences can be equal but for rounding, which a test would take for certainty
    if spread > ROUNDING * max(map(abs, [*values.values(), *baseline.values()]), default=0.0):
        test = stats.ttest_1samp(list(by_seed.values()), 0.0)
        interval = test.confidence_interval(1 - ALPHA / comparisons)
        found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return {**found, "by_seed": by_seed}


def holm(ps: Sequence[float | None], comparisons: int) -> list[float | None]:
    """Return the p-values corrected for that many comparisons by Holm's method; a None counts as one not yet made."""
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, (p, place) in enumerate(sorted((p, place) for place, p in enumerate(ps) if p is not None)):
        least = max(least, min(1.0, p * (comparisons - rank)))
        corrected[place] = least
    return corrected


def seeds_needed(std: float, difference: float, comparisons: int = 1) -> int | None:
    """Return the smallest number of seeds at which the paired t-test finds a difference in 80 % of all repetitions.

    std: standard deviation of the paired differences, above 0. The test is two-sided at 0.05 / comparisons; its power
    is that of the noncentral t distribution, without the side of the wrong sign, which scipy cannot compute everywhere
    and which is below 1e-3 of it. None: more than 10,000 seeds.
    """
    from scipy import stats

    for n in range(2, MOST_SEEDS + 1):
        critical = stats.t.ppf(1 - ALPHA / comparisons / 2, n - 1)
        shift = abs(difference) / std * math.sqrt(n)
        if stats.nct.sf(critical, n - 1, shift) >= POWER:
            return n
    return None


def pooled(stds: Sequence[float]) -> float:
    """Return the standard deviation that has the mean of the variances."""
    return math.sqrt(math.fsum(std**2 for std in stds) / len(stds))


def rank_correlation(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return Spearman's rank correlation of pairs, and its two-sided p. For few pairs, where the usual formula does not
    hold, p is exact: the share of all orders that correlate at least as strongly."""
    from scipy import stats

    ours, theirs = zip(*pairs, strict=True)
    test = stats.spearmanr(ours, theirs)
    if len(pairs) > MOST_ORDERED:
        return float(test.statistic), float(test.pvalue)
    ranks, fixed = stats.rankdata(ours), stats.rankdata(theirs)
    orders = numpy.array([*permutations(ranks - ranks.mean())]) @ (fixed - fixed.mean())
    return float(test.statistic), float((abs(orders) > abs(orders[0]) - 1e-9).mean())
