"""Search methods are functions of the earlier trials."""

import math

import pytest

from scmoe.sweeps.search import Trial, best, propose, total
from scmoe.sweeps.sweep_file import Sweep
from tests.support.sweeps import GOOD

LR = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}
COMBINE = {"values": ["cg1", "cg2", "direct_add"]}


def loss(trial: Trial) -> float:
    """The loss is least for lr = 1e-3 and cg1."""
    return abs(math.log10(trial.parameters["optim.lr"]) + 3) + (
        trial.parameters["moe.combine"] != "cg1"
    )


def search(sweep: Sweep, trials: list[Trial] | None = None, last: int | None = None) -> list[Trial]:
    trials = list(trials or [])
    while (trial := propose(sweep, trials)) and trial.number <= (last or 10**6):
        trial.state, trial.history = "finished", [loss(trial)]
        trials.append(trial)
    return trials


def test_grid_is_every_combination_once_and_run_cap_cuts_it(sweep_of):
    space = {
        "optim.lr": {"values": [1e-3, 1e-2]},
        "moe.combine": COMBINE,
        "seed": {"min": 1, "max": 2},
    }
    sweep = sweep_of(method="grid", parameters=space, run_cap=None)
    trials = search(sweep)
    assert total(sweep) == len(trials) == 12
    assert len({tuple(trial.parameters.values()) for trial in trials}) == 12
    assert [trial.number for trial in trials] == list(range(1, 13))
    cut = sweep_of(method="grid", parameters=space, run_cap=5)
    assert total(cut) == 5
    assert search(cut) == trials[:5]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_an_interrupted_search_proposes_the_same_trials(method, sweep_of):
    sweep = sweep_of(method=method, parameters={"optim.lr": LR, "moe.combine": COMBINE}, run_cap=14)
    whole = search(sweep)
    assert search(sweep, search(sweep, last=5)) == whole
    assert len(whole) == total(sweep) == 14
    assert all(1e-5 <= trial.parameters["optim.lr"] <= 1e-1 for trial in whole)
    assert len({trial.parameters["optim.lr"] for trial in whole}) == 14
    assert total(sweep_of(method=method, run_cap=None)) is None


def test_bayes_finds_lower_losses_than_random(sweep_of):
    """After 10 random trials, the next 20 are near the least loss."""
    space = {"optim.lr": LR, "moe.combine": COMBINE}
    late = {
        m: search(sweep_of(method=m, parameters=space, run_cap=30))[10:]
        for m in ("bayes", "random")
    }
    mean = {method: sum(map(loss, trials)) / len(trials) for method, trials in late.items()}
    assert mean["bayes"] < 0.7 * mean["random"]


def test_a_trial_that_ends_with_nan_teaches_bayes_nothing(sweep_of):
    sweep = sweep_of(
        method="bayes", parameters={"optim.lr": LR, "moe.combine": COMBINE}, run_cap=40
    )
    trials = search(sweep, last=12)

    def proposed(value: list[float], state: str) -> Trial | None:
        return propose(
            sweep, [*trials, Trial(13, trials[0].point, trials[0].parameters, state, value)]
        )

    first, second = proposed([math.nan], "finished"), proposed([], "finished")
    assert first == second != proposed([1.0], "finished")
    assert (
        best(
            sweep, [Trial(1, {}, {}, "finished", [math.nan]), Trial(2, {}, {}, "finished", [3.0])]
        ).number
        == 2
    )


def test_bayes_avoids_where_trials_fail(sweep_of):
    """A failed trial counts with the worst value, whatever it has logged."""
    sweep = sweep_of(
        method="bayes", parameters={"optim.lr": LR, "moe.combine": COMBINE}, run_cap=40
    )
    trials: list[Trial] = []
    while trial := propose(sweep, trials):
        trial.state = "failed" if trial.parameters["optim.lr"] > 1e-3 else "finished"
        trial.history = [0.0] if trial.state == "failed" else [loss(trial)]
        trials.append(trial)
    assert sum(trial.state == "failed" for trial in trials[20:]) < 10


def test_target_ends_a_sweep(sweep_of):
    metric = {**GOOD["metric"], "target": 0.5}
    trials = search(
        sweep_of(metric=metric, parameters={"optim.lr": LR, "moe.combine": COMBINE}, run_cap=500)
    )
    assert [loss(trial) <= 0.5 for trial in trials] == [False] * (len(trials) - 1) + [True]
