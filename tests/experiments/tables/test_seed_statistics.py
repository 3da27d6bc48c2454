"""A table's means and corrected differences are right."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.tables.seed_statistics import compare, describe, holm, seeds_needed


def test_mean_and_sample_deviation():
    found = describe({1: 1.0, 2: 2.0, 3: 6.0})
    assert (found["mean"], found["std"], found["n"]) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert (found["median"], found["range"]) == (2.0, [1.0, 6.0])
    assert describe({1: 1.5})["std"] is None
    assert describe({}) == {"mean": None, "std": None, "n": 0, "median": None, "range": None}


def test_a_difference_is_taken_seed_by_seed():
    """The differences are 1, 2, 3; so t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, p =
    0.0742, and the interval is 2 -+ 4.3027 / sqrt 3."""
    found = compare({1: 11.0, 2: 22.0, 3: 33.0, 4: 99.0}, {3: 30.0, 2: 20.0, 1: 10.0})
    assert (found["mean"], found["std"], found["n"]) == (2.0, 1.0, 3)
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    ends = [found["low"], found["high"]]
    assert ends == pytest.approx([2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "baseline"),
    [
        ({1: 2.0}, {1: 1.0, 2: 2.0}),
        ({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}),
        ({}, {1: 1.0, 2: 2.0}),
        ({1: 0.3, 2: 0.2}, {1: 0.2, 2: 0.1}),  # the differences are equal but for rounding
    ],
)
def test_there_is_no_p_value_where_no_test_is_possible(values, baseline):
    found = compare(values, baseline)
    assert (found["p"], found["low"], found["high"], found["n"]) == (None, None, None, len(values))


def test_an_interval_of_seven_comparisons_is_bonferronis():
    values, baseline = {1: 1.0, 2: 2.0, 3: 6.0}, dict.fromkeys((1, 2, 3), 0.0)
    half = stats.t.ppf(1 - 0.05 / 7 / 2, 2) * math.sqrt(7) / math.sqrt(3)
    found = compare(values, baseline, comparisons=7)
    assert [found["low"], found["high"]] == pytest.approx([3 - half, 3 + half])
    assert found["p"] == compare(values, baseline)["p"], (
        "p is corrected over all rows at once, by holm"
    )


def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9], 2) == [1.0, 1.0]
    assert holm([None, 0.01], 2) == [None, 0.02], "a comparison that is not made yet counts"


def test_seeds_needed_are_those_of_gpower_and_have_the_power_in_simulated_tables():
    """G*Power's are of a paired t-test. In simulated tables of seven comparisons a difference of
    5.4 deviations is decided more often than in 80 % of them with four seeds, not with three."""
    found = [seeds_needed(0.1, -0.1 * effect) for effect in (0.5, 0.8, 1.0, 2.0)]
    assert found == [34, 15, 10, 5]
    assert seeds_needed(1.0, 1.0, comparisons=7) == 17
    assert seeds_needed(1.0, 5.4, comparisons=7) == 4
    drawn = np.random.default_rng(0).normal(5.4, 1.0, (20_000, 4))
    three, four = (stats.ttest_1samp(drawn[:, :n], 0.0, axis=1).pvalue < 0.05 / 7 for n in (3, 4))
    assert three.mean() < 0.8 < four.mean()
