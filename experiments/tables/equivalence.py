"""Are two rows equal within a margin, or different? Unpaired tests at a few registered looks.

Two questions are asked of each pair of rows, with Welch's t over all seeds of both:

    equal      two one-sided tests (TOST): the difference is above -margin, and below +margin
    different  a two-sided test against 0

Several looks raise the errors, so each look has a level of its own, after Lan and DeMets, "Discrete
sequential boundaries for clinical trials" (1983), with a spending function of O'Brien and Fleming's
type. A pair's answer is that of the first look that decides it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

from experiments.tables.seed_statistics import ALPHA, Values
from experiments.tables.table_file import Decision

EARLY = "no look yet"
UNDECIDED = "undecided"
DIGITS = 6  # of a look's level
FARTHEST = 7.0  # below 0, in standard deviations at the last look
POINTS = 1001


def equivalences(
    decision: Decision, values: Mapping[str, Values], ended: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the answer for each pair of rows, a later row minus an earlier one, with the looks.

    values: by seed, of each row in the table's order. ended: the seeds of each row, in order, whose
    run has finished or failed for good, up to the first one that is still to run.
    """
    seeds = min(ended.values(), key=len, default=())
    reached = {look: seeds[:look] for look in decision.looks if look <= len(seeds)}
    rows = {
        f"{row} minus {earlier}": answer(decision, values[row], values[earlier], reached)
        for earlier, row in combinations(values, 2)
    }
    return {
        "margin": decision.margin,
        "looks": list(decision.looks),
        "reached": list(reached),
        "rows": rows,
    }


def answer(
    decision: Decision, values: Values, baseline: Values, reached: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Return what the first deciding look says of a pair; if none decides, what the last one says.

    reached: the seeds of each look that is reached.
    """
    result: dict[str, Any] = {"n": 0, "answer": EARLY}
    for look, seeds in reached.items():
        compared = [values[seed] for seed in seeds if seed in values]
        with_them = [baseline[seed] for seed in seeds if seed in baseline]
        if min(len(compared), len(with_them)) < 2:  # the others of a row have failed
            result = {"look": look, "n": 0, "answer": UNDECIDED}
            continue
        result = {"look": look, **compare_at(decision, look, compared, with_them)}
        if result["answer"] != UNDECIDED:
            break
    return result


def interval_of_answer(tested: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the interval of the test that has answered: that of the two-sided test if rows are
    lower or higher, else that of TOST; two None where there is none."""
    is_different = tested["answer"].endswith(("lower", "higher"))
    low, high = tested["interval_of_difference" if is_different else "interval"]
    return low, high


def compare_at(
    decision: Decision, look: int, values: Sequence[float], baseline: Sequence[float]
) -> dict[str, Any]:
    """Return the difference of two means, both tests at the levels of a look, and their answer.

    interval: excludes the margin exactly if TOST holds. interval_of_difference: excludes 0 exactly
    if the two-sided test does.
    """
    from scipy import stats

    margin = decision.margin
    equal_level = level(decision.looks, look, ALPHA)
    side_level = level(decision.looks, look, ALPHA / 2)
    against_0 = stats.ttest_ind(values, baseline, equal_var=False)
    above = stats.ttest_ind(
        [value + margin for value in values], baseline, equal_var=False, alternative="greater"
    )
    below = stats.ttest_ind(
        [value - margin for value in values], baseline, equal_var=False, alternative="less"
    )
    difference = sum(values) / len(values) - sum(baseline) / len(baseline)
    tost_p = max(float(above.pvalue), float(below.pvalue))
    p = float(against_0.pvalue)

    sentences = []
    if tost_p < equal_level:
        sentences.append(f"equal within {margin:g}")
    if p < 2 * side_level:
        sentences.append("lower" if difference < 0 else "higher")
    return {
        "n": min(len(values), len(baseline)),
        "difference": difference,
        "interval": interval_at(against_0, equal_level),
        "interval_of_difference": interval_at(against_0, side_level),
        "tost_p": tost_p,
        "tost_level": equal_level,
        "p": p,
        "level": 2 * side_level,
        "answer": " and ".join(sentences) or UNDECIDED,
    }


def interval_at(tested: Any, one_sided_level: float) -> list[float | None]:
    """Return the interval of a difference at a level; two None where the level of an early look is
    0, or no test is possible."""
    low, high = map(float, tested.confidence_interval(1 - 2 * one_sided_level))
    return [low, high] if math.isfinite(low) and math.isfinite(high) else [None, None]


@cache
def level(looks: tuple[int, ...], look: int, alpha: float) -> float:
    """Return the one-sided level of a look, so that all looks together have the level alpha."""
    return round(levels(looks, alpha)[looks.index(look)], DIGITS)


@cache
def levels(looks: tuple[int, ...], alpha: float) -> list[float]:
    """Return the one-sided level of each look.

    A look with information t has spent 2 (1 - Phi(z / sqrt(t))) of alpha, of O'Brien and Fleming's
    type. Its bound is the one that a Brownian motion, below all earlier bounds until then, crosses
    with the probability that this look adds. The density of that motion is carried from look to
    look on a grid (Armitage, McPherson and Rowe, 1969).
    """
    import numpy as np
    from scipy import optimize, stats

    z = stats.norm.ppf(1 - alpha / 2)
    result: list[float] = []
    spent = 0.0
    time = 0.0
    places, density = np.zeros(1), np.ones(1)  # at time 0 the motion is at 0
    for look in looks:
        time_before, time = time, look / looks[-1]
        spent_before, spent = spent, 2 * stats.norm.sf(z / time**0.5)
        step = stats.norm(scale=(time - time_before) ** 0.5)
        weights = density * _spacing(places)

        bound = optimize.brentq(_excess, 0.0, 8.0, (step, places, weights, spent - spent_before))
        result.append(float(stats.norm.sf(bound / time**0.5)))
        grid = np.linspace(-FARTHEST, bound, POINTS)
        density = step.pdf(grid[:, None] - places) @ weights
        places = grid
    return result


def _excess(bound: float, step: Any, places: Any, weights: Any, to_spend: float) -> float:
    """Return the probability, above `to_spend`, that a motion steps over a bound. weights: its
    probabilities at `places`."""
    return float(step.sf(bound - places) @ weights) - to_spend


def _spacing(places: Any) -> Any:
    """Return the weights of the trapezoidal rule on an even grid; of a single place: 1."""
    import numpy as np

    if len(places) == 1:
        return np.ones(1)
    spacing = np.full(len(places), places[1] - places[0])
    spacing[[0, -1]] /= 2
    return spacing
