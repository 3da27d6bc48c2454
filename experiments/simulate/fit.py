"""Parameters from few measured numbers: least squares in logarithms, and jackknife+ intervals
(Barber, Candès, Ramdas and Tibshirani, 2021).

Leave one number out and fit the others: the residual there says how far a prediction may be off.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

Values = Mapping[str, float]
"""Parameters by name, all positive."""
Predict = Callable[[Values], Sequence[float]]
"""Return a prediction of each number."""

PULL = 2e-3  # of a parameter's logarithm to 0: it decides what the numbers do not determine
STARTS = 12
LARGEST = 6.0  # logarithm of a parameter


class Interval(NamedTuple):
    low: float
    high: float


def fit(
    predict: Predict,
    numbers: Sequence[float],
    weights: Sequence[float],
    names: Sequence[str],
    pull: float = PULL,
) -> dict[str, float]:
    """Return the parameters whose predictions have the least sum of squares of
    weight * log(predicted / number).

    names: of the parameters. The least of STARTS solutions is taken, as there are several minima.
    """
    logs = np.log(np.asarray(numbers))
    weight = np.asarray(weights)

    def parameters(x: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(x).tolist(), strict=True))

    def residuals(x: np.ndarray) -> np.ndarray:
        errors = np.log(np.asarray(predict(parameters(x)))) - logs
        return np.concatenate([weight * errors, pull * x])

    generator = np.random.default_rng(0)
    starts = [np.zeros(len(names))]
    starts += [generator.normal(0.0, 1.0, len(names)) for _ in range(STARTS - 1)]
    solutions = [least_squares(residuals, start, bounds=(-LARGEST, LARGEST)) for start in starts]
    best = min(solutions, key=lambda solution: float(solution.cost))
    return parameters(best.x)


class LeftOut(NamedTuple):
    """The fit without one number. residual: |log(predicted / number)| there, times its weight."""

    parameters: dict[str, float]
    predicted: float
    residual: float


def leave_one_out(
    predict: Predict, numbers: Sequence[float], weights: Sequence[float], names: Sequence[str]
) -> list[LeftOut]:
    """Return the fit without each number in turn."""
    fits = []
    for index, number in enumerate(numbers):
        without = [*weights]
        without[index] = 0.0
        parameters = fit(predict, numbers, without, names)
        predicted = predict(parameters)[index]
        residual = weights[index] * abs(math.log(predicted / number))
        fits.append(LeftOut(parameters, predicted, residual))
    return fits


def jackknife_plus(predictions: Sequence[float], residuals: Sequence[float]) -> Interval:
    """Return the interval of one number, from its predictions by the fits that left one out, and
    the residuals of these.

    It covers at least 1 - 2 / (n + 1) of exchangeable numbers, with n fits.
    """
    pairs = list(zip(predictions, residuals, strict=True))
    low = min(predicted * math.exp(-residual) for predicted, residual in pairs)
    high = max(predicted * math.exp(residual) for predicted, residual in pairs)
    return Interval(low, high)
