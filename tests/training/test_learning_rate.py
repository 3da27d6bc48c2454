"""Learning rates rise, stay and fall as their schedule says."""

import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from scmoe.config.fields import OptimConfig
from scmoe.training.learning_rate import LearningRate


def test_the_learning_rate_warms_up_and_follows_a_half_cosine():
    ratio = LearningRate("cosine", max_steps=12, warmup_steps=4, min_ratio=0.2).ratio
    assert [ratio(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert ratio(4) == 1.0
    assert ratio(6) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert ratio(8) == pytest.approx(0.6)
    assert ratio(12) == ratio(13) == 0.2


@pytest.mark.parametrize("kind", get_args(OptimConfig.__annotations__["schedule"]))
@pytest.mark.parametrize("warmup, steps", ((0, 1), (0, 50), (7, 50), (49, 50), (50, 50), (60, 50)))
def test_every_schedule_rises_in_equal_steps_never_rises_again_and_ends_at_its_last_step(
    kind, warmup, steps
):
    rate = LearningRate(kind, steps, warmup, min_ratio=0.2)
    ratios = [rate.ratio(step) for step in range(steps + 10)]
    assert ratios[:warmup] == [(step + 1) / warmup for step in range(warmup)][: steps + 10]
    after = ratios[warmup:]
    assert after == sorted(after, reverse=True)
    end = 1.0 if kind == "constant" else 0.2
    assert all(ratio == end for ratio in ratios[max(steps, warmup) :])
    if kind != "constant" and warmup < steps:
        assert rate.ratio(steps - 1) > end


def test_wsd_is_stable_and_decays_in_equal_steps_in_its_last_ones():
    rate = LearningRate("wsd", max_steps=50, warmup_steps=10, min_ratio=0.0)
    assert [rate.ratio(step) for step in range(9, 41)] == [1.0] * 32
    assert [rate.ratio(step) for step in range(41, 51)] == [
        pytest.approx(left / 10) for left in range(9, -1, -1)
    ]
    short = LearningRate("wsd", max_steps=50, warmup_steps=10, min_ratio=0.0, decay_steps=2)
    assert [short.ratio(step) for step in (47, 48, 49, 50)] == [1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("kind", get_args(OptimConfig.__annotations__["schedule"]))
def test_a_resumed_optimizer_has_the_rates_of_one_that_was_not_stopped(kind):
    """Both go through torch's LambdaLR; the second one is new at step 5, with the state of the
    first, and has another length from then on."""
    optimizers = [SGD([nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(3)]
    lengths = (12, 8, 12)
    whole, stopped, resumed = (
        LambdaLR(optimizer, LearningRate(kind, length, 3).ratio)
        for optimizer, length in zip(optimizers, lengths, strict=True)
    )
    for scheduler in (whole, stopped):
        for _ in range(5):
            scheduler.optimizer.step()
            scheduler.step()
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(7):
        for scheduler in (whole, resumed):
            scheduler.optimizer.step()
            scheduler.step()
        assert whole.get_last_lr() == resumed.get_last_lr()
