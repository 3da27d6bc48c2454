"""The gradient norms of parts are those of the whole model on any number of ranks, and add up to
the global norm."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.engine.ranks import run_ranks
from scmoe.training.callbacks.gradient_norms import GradientNorms
from tests.support.trainings import RecordingModel, fit, tiny

pytestmark = pytest.mark.ranks


class Norms(RecordingModel):
    """Keeps what is logged of gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[dict[str, float]] = []

    def log_dict(self, values: Any, *args: Any, **kwargs: Any) -> None:
        self.norms += [
            {name: float(value) for name, value in values.items() if name.startswith("grad_norm/")}
        ]
        super().log_dict(values, *args, **kwargs)


def norms_of(rank: int, world_size: int, words: str) -> list[dict[str, float]]:
    """Return the norms of each step on this rank."""
    config = tiny(words, world_size)
    module = Norms(config)
    # else Lightning's own saves a file
    fit(config, GradientNorms(), ModelCheckpoint(save_top_k=0), module=module)
    return [
        {**norms, "all": float(whole)}
        for norms, whole in zip(module.norms, module.logged["train/grad_norm"], strict=True)
    ]


WORDS = "trainer.max_steps=2 trainer.log_every=1 trainer.gradient_clip=0.1 trainer.accumulate=2"


def test_norms_on_one_and_four_ranks():
    """float64: sums of another order differ by 1e-13 of the whole. Clipping must not change what is
    logged."""
    (alone,) = run_ranks(norms_of, 1, WORDS)
    assert len(alone) == 2
    kinds = {
        "attention",
        "embedding",
        "experts",
        "gates",
        "mlp",
        "norms",
        "shared_expert",
        "output",
    }
    for norms in alone:
        assert (
            {f"grad_norm/{kind}" for kind in kinds}
            >= norms.keys() - {"all"}
            >= {"grad_norm/experts"}
        )
        squares = sum(value**2 for name, value in norms.items() if name != "all")
        assert squares == pytest.approx(norms["all"] ** 2, rel=1e-12)
        assert norms["all"] > 0.1, "nothing was clipped, so the test would not see it"
    for of_rank in run_ranks(norms_of, 4, f"{WORDS} strategy.ep_size=2"):
        for norms, expected in zip(of_rank, alone, strict=True):
            assert norms == pytest.approx(expected, rel=1e-10)
