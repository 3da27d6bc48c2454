"""Values over seeds, and their differences to a baseline.

A difference is taken seed by seed, since rows with the same seed see the same data and start with
the same weights; the test is Student's t on these differences, two-sided. A table compares several
rows, so its numbers are corrected:

    p          Holm's step-down correction over the table's comparisons
    low, high  Bonferroni's simultaneous intervals: each at 1 - 0.05 / comparisons, together they
               hold at 95 %

Holm decides a little more than Bonferroni, so a difference can be decided while its interval just
touches 0.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from experiments.tables.table_file import TableRow

ALPHA = 0.05
POWER = 0.8
ROUNDING_SHARE = 1e-9  # differences that vary by less than this share of the values are equal
Values = Mapping[int, float]  # by seed


def differences(
    rows: Sequence[TableRow], values: Mapping[str, Values]
) -> dict[str, dict[str, Any]]:
    """Return the differences of rows to their baselines by name, as `compare` returns them, with p
    corrected, and whether they are decided. values: by the row's name; a row that has none, or
    whose baseline has none, is left out.
    """
    compared = [r for r in rows if not r.is_baseline and r.name in values and r.baseline in values]
    minus = {r.name: compare(values[r.name], values[r.baseline], len(compared)) for r in compared}
    corrected = holm([difference["p"] for difference in minus.values()], len(compared))
    for difference, p in zip(minus.values(), corrected, strict=True):
        difference["p"] = p
        difference["decided"] = p is not None and p < ALPHA
    return minus


def describe(values: Values) -> dict[str, Any]:
    """Return mean, std (of a sample; None for one value), n, median and range of values by seed."""
    n = len(values)
    all_values = list(values.values())
    if n == 0:
        return {"mean": None, "std": None, "n": 0, "median": None, "range": None}
    return {
        "mean": fmean(all_values),
        "std": stdev(all_values) if n > 1 else None,
        "n": n,
        "median": median(all_values),
        "range": [min(all_values), max(all_values)],
    }


def compare(values: Values, baseline: Values, comparisons: int = 1) -> dict[str, Any]:
    """Return the differences over the seeds that both have: mean, std, n, interval (low, high), p
    and by_seed.

    comparisons: of the table, by which the interval is widened; p is corrected by `holm`, over all
    rows at once. low, high and p are None for fewer than two pairs and for differences that are all
    equal.
    """
    from scipy import stats

    by_seed = {
        seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())
    }
    facts = describe(by_seed)
    difference = {name: facts[name] for name in ("mean", "std", "n")}
    difference |= dict.fromkeys(("low", "high", "p"))
    spread = max(by_seed.values(), default=0.0) - min(by_seed.values(), default=0.0)
    # accuracies have few values: their differences can be equal but for rounding, which a test
    # would take for certainty
    if spread > ROUNDING_SHARE * max(map(abs, [*values.values(), *baseline.values()]), default=0.0):
        test = stats.ttest_1samp(list(by_seed.values()), 0.0)
        interval = test.confidence_interval(1 - ALPHA / comparisons)
        difference["low"] = float(interval.low)
        difference["high"] = float(interval.high)
        difference["p"] = float(test.pvalue)
    return {**difference, "by_seed": by_seed}


def holm(ps: Sequence[float | None], comparisons: int) -> list[float | None]:
    """Return the p-values corrected for that many comparisons by Holm's method. None: a comparison
    without a value yet."""
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (comparisons - rank)))
        corrected[index] = least
    return corrected


def seeds_needed(std: float, difference: float, comparisons: int = 1) -> int:
    """Return the smallest number of seeds of a row with which the interval of `compare` excludes 0
    with POWER, if the true difference is this one.

    std: of the differences by seed. The power of the t-test is that of the noncentral t
    distribution, without the tail of the wrong sign, which adds next to nothing.
    """
    from scipy import stats

    side_level = ALPHA / comparisons / 2
    effect = abs(difference) / std
    quantiles = stats.norm.isf(side_level) + stats.norm.ppf(POWER)
    # a normal test, whose standard deviation is known, needs fewer
    n = max(2, math.ceil((quantiles / effect) ** 2))
    while stats.nct.sf(stats.t.isf(side_level, n - 1), n - 1, effect * math.sqrt(n)) < POWER:
        n += 1
    return n
