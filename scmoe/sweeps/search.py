"""Proposes the next trial by W&B's methods, which are functions of the trials so far.

There is no other state, so an interrupted sweep continues where it was. bayes is optuna's
tree-structured Parzen estimator on each parameter's quantiles (docs/decisions/0022-search.md says
why optuna's other samplers are not used).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

from scmoe.sweeps.sweep_file import Sweep, grid

# A point of the search space: for each parameter the index of its choice, or the quantile of its
# distribution. Only bayes needs them.
Point = dict[str, int | float]


@dataclass
class Trial:
    """number: from 1. history: the metric's values, in the order of logging."""

    number: int
    point: Point
    parameters: dict[str, Any]
    state: str = "running"  # or finished | failed | cut
    history: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    run_dir: str = ""
    reason: str = ""

    @property
    def value(self) -> float | None:
        """Return the value that judges the trial: the last one, as in W&B's summary. None: there is
        none, or it is not finite."""
        return self.history[-1] if self.history and math.isfinite(self.history[-1]) else None


def best(sweep: Sweep, trials: Sequence[Trial]) -> Trial | None:
    """Return the first of the finished trials with the best value; None: there is none."""
    sign = 1 if sweep.minimize else -1
    judged = [trial for trial in trials if trial.state == "finished" and trial.value is not None]
    return min(judged, key=lambda trial: sign * (trial.value or 0.0), default=None)


def target_reached(sweep: Sweep, trials: Sequence[Trial]) -> bool:
    """Return whether a trial is as good as metric.target, which ends the sweep."""
    target, first = sweep.raw.get("metric", {}).get("target"), best(sweep, trials)
    if target is None or first is None or first.value is None:
        return False
    return first.value <= target if sweep.minimize else first.value >= target


def propose(sweep: Sweep, trials: Sequence[Trial]) -> Trial | None:
    """Return the next trial; None: there is none. Equal trials give an equal next one."""
    if sweep.run_cap is not None and len(trials) >= sweep.run_cap:
        return None
    if target_reached(sweep, trials):
        return None
    number = len(trials) + 1
    if sweep.method == "bayes":
        point = _bayes(sweep, trials)
        parameters = {name: sweep.axes[name].at(point[name]) for name in point}
        return Trial(number, point, parameters)
    if sweep.method == "grid":
        combination = next(islice(grid(sweep), len(trials), None), None)
        return None if combination is None else Trial(number, {}, combination)
    draw = Random(f"{sweep.base.seed} {len(trials)}")
    drawn = {name: axis.quantile(draw.random()) for name, axis in sweep.axes.items()}
    return Trial(number, {}, drawn)


def total(sweep: Sweep) -> int | None:
    """Return how many trials there will be at most; None: unlimited."""
    sizes = [sweep.run_cap] if sweep.run_cap is not None else []
    if sweep.method == "grid":
        sizes.append(math.prod(len(axis.grid) for axis in sweep.axes.values()))
    return min(sizes, default=None)


def _bayes(sweep: Sweep, trials: Sequence[Trial]) -> Point:
    """Return the point that optuna proposes. A failed trial counts with the worst value so far, so
    that the search avoids its neighbourhood."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {
        name: (
            FloatDistribution(0, 1)
            if axis.choices is None
            else CategoricalDistribution(range(len(axis.choices)))
        )
        for name, axis in sweep.axes.items()
    }
    sampler = optuna.samplers.TPESampler(seed=sweep.base.seed + len(trials), multivariate=True)
    study = optuna.create_study(
        sampler=sampler, direction="minimize" if sweep.minimize else "maximize"
    )
    worst = _worst(sweep, [trial for trial in trials if trial.state == "finished"])
    for trial in trials:
        value = {"finished": trial.value, "failed": worst}.get(trial.state)
        if value is not None:
            study.add_trial(
                optuna.create_trial(params=trial.point, distributions=distributions, value=value)
            )
    return study.ask(distributions).params


def _worst(sweep: Sweep, trials: Sequence[Trial]) -> float | None:
    """Return the worst value of the trials; None: there is none."""
    values = [trial.value for trial in trials if trial.value is not None]
    return (max if sweep.minimize else min)(values, default=None)
