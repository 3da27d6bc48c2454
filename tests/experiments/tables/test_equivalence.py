"""A registered experiment: levels of its looks, and answers that are right as often as they say."""

from random import Random

import pytest
from scipy import stats

from experiments.tables.equivalence import compare_at, equivalences, interval_of_answer, levels
from experiments.tables.table_file import Decision

DECISION = Decision(margin=0.01, looks=(16, 24, 40))


def values(mean: float, seeds: int, spread: float, start: int) -> dict[int, float]:
    """Return a normal value for each seed."""
    draw = Random(start)
    return {seed: draw.gauss(mean, spread) for seed in range(1, seeds + 1)}


def compare(row: dict[int, float], baseline: dict[int, float]) -> dict:
    both = {"baseline": baseline, "row": row}
    found = equivalences(DECISION, both, {name: list(seeds) for name, seeds in both.items()})
    return found["rows"]["row minus baseline"]


def test_levels_of_looks():
    """The published bounds of O'Brien and Fleming's type for five equal looks, two-sided 0.05."""
    bounds = [stats.norm.isf(level) for level in levels((1, 2, 3, 4, 5), 0.025)]
    assert bounds == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=2e-3)
    assert levels((40,), 0.05) == pytest.approx([0.05])


def test_an_interval_says_what_its_test_says():
    for start in range(40):
        row, baseline = values(0.004, 24, 0.01, start), values(0.0, 24, 0.01, 100 + start)
        tested = compare_at(DECISION, 24, list(row.values()), list(baseline.values()))
        low, high = tested["interval"]
        assert (low > -0.01 and high < 0.01) == (tested["tost_p"] < tested["tost_level"])
        low, high = tested["interval_of_difference"]
        assert (low > 0 or high < 0) == (tested["p"] < tested["level"])


def test_errors_over_all_looks_stay_below_their_level():
    """At a true difference of the margin, few experiments say equal; at 0, few say different."""
    trials = 150
    wrong_equal = 0
    wrong_different = 0
    for start in range(trials):
        baseline = values(3.7, 40, 0.012, 2 * start)
        at_margin = compare(values(3.71, 40, 0.012, 2 * start + 1), baseline)
        same = compare(values(3.7, 40, 0.012, 2 * start + 1), baseline)
        wrong_equal += "equal" in at_margin["answer"]
        wrong_different += "lower" in same["answer"] or "higher" in same["answer"]
    most = stats.binom.isf(1e-3, trials, 0.05)
    assert wrong_equal <= most
    assert wrong_different <= most


def test_a_pair_keeps_the_answer_of_its_first_deciding_look():
    apart = compare(values(3.8, 24, 0.012, 1), values(3.7, 24, 0.012, 2))
    assert apart["look"] == 16 and apart["answer"] == "higher"
    early = compare(values(3.7, 15, 0.012, 1), values(3.7, 15, 0.012, 2))
    assert early["answer"] == "no look yet" and early["n"] == 0
    wide = compare(values(3.7, 40, 0.1, 3), values(3.7, 40, 0.1, 4))
    assert wide["look"] == 40 and wide["answer"] == "undecided"


def test_the_interval_of_an_answer_shows_it():
    """It excludes 0 where rows differ, lies within the margin where they are equal, and else does
    neither."""
    low, high = interval_of_answer(compare(values(3.8, 24, 0.012, 1), values(3.7, 24, 0.012, 2)))
    assert 0 < low < high
    low, high = interval_of_answer(compare(values(3.7, 40, 0.004, 1), values(3.7, 40, 0.004, 2)))
    assert -DECISION.margin < low < high < DECISION.margin
    low, high = interval_of_answer(compare(values(3.7, 40, 0.1, 3), values(3.7, 40, 0.1, 4)))
    assert low < -DECISION.margin < DECISION.margin < high


def test_a_look_waits_for_every_row_and_passes_a_failed_seed():
    row, baseline = values(3.7, 24, 0.012, 1), values(3.7, 16, 0.012, 2)
    del row[3]  # its run has failed
    found = equivalences(
        DECISION, {"a": baseline, "b": row}, {"a": list(baseline), "b": list(range(1, 25))}
    )
    assert found["reached"] == [16]
    assert found["rows"]["b minus a"]["n"] == 15


def test_a_row_whose_runs_have_all_failed_is_undecided():
    values = {"baseline": {1: 3.0, 2: 3.1}, "row": {}}
    ended = {"baseline": [1, 2], "row": [1, 2]}
    found = equivalences(Decision(0.01, (2, 4)), values, ended)
    tested = found["rows"]["row minus baseline"]
    assert (tested["n"], tested["answer"]) == (0, "undecided")


def test_a_look_too_early_for_a_test_has_no_interval():
    """The level of 2 of 40 seeds is below 1e-17, and one seed has no deviation."""
    both = {"baseline": {1: 1.0, 2: 1.1}, "row": {1: 1.2, 2: 1.0}}
    early = equivalences(Decision(0.01, (2, 40)), both, {name: [1, 2] for name in both})
    tested = early["rows"]["row minus baseline"]
    assert (tested["interval"], tested["answer"]) == ([None, None], "undecided")
    assert interval_of_answer(tested) == (None, None)
    single = equivalences(Decision(0.01, (1, 2)), both, {name: [1] for name in both})
    assert single["rows"]["row minus baseline"]["n"] == 0
