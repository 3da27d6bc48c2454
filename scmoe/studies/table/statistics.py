"""Means of a table's row over seeds, and its differences to the baseline row.

A difference is taken seed by seed, since rows with the same seed see the same tokens and start with the same weights;
the test is Student's t on these differences (scipy's ttest_rel), two-sided and not corrected for the number of rows.
"""

import math
from collections.abc import Mapping
from typing import Any


def describe(values: Mapping[int, float]) -> dict[str, Any]:
    """Return mean, std (of a sample; None for one value) and n of values by seed."""
    n = len(values)
    if n == 0:
        return {"mean": None, "std": None, "n": 0}
    mean = math.fsum(values.values()) / n
    squares = math.fsum((value - mean) ** 2 for value in values.values())
    return {"mean": mean, "std": math.sqrt(squares / (n - 1)) if n > 1 else None, "n": n}


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any]:
    """Describe the differences over the seeds that both have, with the 95 % interval of the mean and p of the test.

    Interval and p are None for fewer than two pairs and for differences that are all equal.
    """
    from scipy import stats

    seeds = sorted(values.keys() & baseline.keys())
    by_seed = {seed: values[seed] - baseline[seed] for seed in seeds}
    found = {**describe(by_seed), "interval_95": None, "p": None, "by_seed": by_seed}
    if len(set(by_seed.values())) > 1:
        test = stats.ttest_rel([values[s] for s in seeds], [baseline[s] for s in seeds])
        found |= {"interval_95": [float(end) for end in test.confidence_interval()], "p": float(test.pvalue)}
    return found


def rank_correlation(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return Spearman's rank correlation of pairs, and its p."""
    from scipy import stats

    test = stats.spearmanr(*zip(*pairs, strict=True))
    return float(test.statistic), float(test.pvalue)
