"""Fault 58: torch.compile compiles again without end, or stops compiling without an error."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from experiments.engine.ranks import run_ranks
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_module
from tests.support.architectures import LATENT
from tests.support.trainings import fit

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

KINDS = ("attention", "MLP", "shared expert")


def both(rank: int, world_size: int, words: str) -> list[tuple[list[int], float, int]]:
    return [graphs(f"{words} trainer.compile={compiled}") for compiled in ("false", "true")]


def graphs(words: str) -> tuple[list[int], float, int]:
    """Train six steps with a validation after every second one. Return the number of graphs after
    each, the last loss, and the number of graph breaks."""
    config = load_config(
        "configs/debug.yaml", [*words.split(), "trainer.max_steps=6", "trainer.val_every=2"]
    )
    torch.manual_seed(1)
    module, counts = build_module(config), list[int]()
    module.on_validation_end = lambda: counts.append(counters["stats"]["unique_graphs"])  # type: ignore
    trainer = fit(config, module=module)
    return (
        counts,
        float(trainer.callback_metrics["train/loss"]),
        sum(counters["graph_break"].values()),
    )


LATENT_WITH_ZERO_EXPERTS = f"model.family=llama {LATENT} moe.router=longcat moe.zero_experts=2"


@pytest.mark.parametrize(
    "words",
    ["model.layers=4", "model.family=llama trainer.recompute=true", LATENT_WITH_ZERO_EXPERTS],
)
def test_nothing_is_compiled_again_after_the_first_validation(words):
    """Each kind of part has a graph with gradients and one without, for any number of layers."""
    (none, plain, _), (counts, loss, breaks) = run_ranks(both, 1, words, timeout_s=280)[0]
    assert counts == [2 * len(KINDS)] * 3 and breaks == 0
    assert none == [0] * 3 and loss == pytest.approx(plain, rel=1e-5)
