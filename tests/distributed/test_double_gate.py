"""In DGMoE-Share two pairs share one module. Two ranks write it once and read it back into both pairs.

test_ep_equality.py shows that training on two ranks equals training on one. Bounds are those of
test_strategy.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from scmoe.experiments.engine.ranks import run_ranks
from tests.support.comparison import TOLERANCE
from tests.support.resuming import HALF, fit, largest_difference, whole
from tests.support.trainings import tiny

pytestmark = pytest.mark.dist

MODEL = "architecture=dgmoe_share model.layers=4 optim.lr=0.01 optim.warmup_steps=2 trainer.max_steps=6"


def uninterrupted_and_resumed(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Returns a run with EP 2, and one with EP 1 that goes on from its middle."""
    ep2, ep1 = (tiny(f"{MODEL} strategy.ep_size={ep_size}", world_size) for ep_size in (2, 1))
    return [fit(ep2, folder), fit(ep1, None, folder / f"step={HALF}.ckpt")]


def test_a_shared_module_is_saved_once_and_resumed_in_any_layout(tmp_path):
    uninterrupted, resumed = zip(*run_ranks(uninterrupted_and_resumed, 2, tmp_path), strict=True)
    error, name = largest_difference(uninterrupted, resumed)
    assert error <= TOLERANCE, name

    written = set()
    for file in (tmp_path / f"step={HALF}.ckpt").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            written |= set(tensors.keys())
    experts = {name for name in written if name.startswith("model.") and ".experts." in name}
    assert experts == {f"model.model.blocks.0.moe.experts.{w}" for w in ("w_in_eDF", "w_out_eFD")}
    assert {name.split()[0] for name in whole(uninterrupted) if "experts" in name} == {
        name.removeprefix("model.model.") for name in experts
    }
