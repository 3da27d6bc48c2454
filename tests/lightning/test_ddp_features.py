"""Lightning's features give under the Strategy what they give under ddp, to the last bit.

A model without experts is trained on two ranks, once with each strategy, in as many ways as
Lightning has features (lightning_updates.py, lightning_loops.py and lightning_checkpoints.py in
tests/support). What differs is named here and in docs/strategy.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from experiments.engine.ranks import run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from tests.support import lightning_checkpoints, lightning_loops, lightning_updates
from tests.support.lightning_net import FEATURES, Runs, differences
from tests.support.trainings import end_groups

pytestmark = pytest.mark.ranks

# they add their features when imported
MODULES = (lightning_updates, lightning_loops, lightning_checkpoints)
NUMBERS = "/(losses|weights|moments|metrics|logged)/"
DIFFERENT = {  # feature: what every line of `differences` says
    "clipping_by_other_means": "/error: absent .* did not call self.clip_gradients",
    "a_loss_that_is_not_finite": "/error: absent .* FloatingPointError: gradient norm is nan",
    "float16": r"/error: absent .* ValueError: trainer\.precision is 16-mixed",
    "bf16_true": NUMBERS,
    "dropout": "/(masks|drawn)/",
    "seeded_workers": NUMBERS,
    "shuffled_without_a_distributed_sampler": NUMBERS,
    "uneven_batches": "/error: absent .* ranks have different numbers of train batches",
    "weight_averaging": "/error: absent .* WeightAveraging keeps a copy",
    "ema_weight_averaging": "/error: absent .* EMAWeightAveraging keeps a copy",
    "stochastic_weight_averaging": "/error: absent .* StochasticWeightAveraging keeps a copy",
    "resume_with_float64": "/exact: False under ddp, True|/resumed/",
    "on_load_checkpoint_that_reads_weights": r"/error: .* reads checkpoint\['state_dict'\]",
    "checkpoints_of_accumulated_steps": "/2/",
    "a_checkpoint_after_an_exception": "/files/",
}


def use_all(rank: int, world_size: int, make_strategy: Any, folder: Path) -> dict[str, Any]:
    """Return what came of each feature, or its error."""
    found = {}
    for name, use in FEATURES.items():
        try:
            found[name] = use(Runs(rank, make_strategy, folder / name))
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        end_groups()
    return found


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> list[list[dict[str, Any]]]:
    """Return what came of all features on each rank, under ddp and under the Strategy."""
    strategies = (DDPStrategy, ExpertParallelStrategy)
    folder = tmp_path_factory.mktemp("used")
    return [
        run_ranks(use_all, 2, strategy, folder / strategy.__name__, timeout_s=280)
        for strategy in strategies
    ]


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_gives_what_it_gives_under_ddp(name, used):
    ddp, ours = used
    for there, here in zip(ddp, ours, strict=True):
        lines = differences(there[name], here[name])
        if name in DIFFERENT:
            assert lines, "no longer a difference"
            lines = [line for line in lines if not re.match(DIFFERENT[name], line, re.DOTALL)]
        assert lines == []
