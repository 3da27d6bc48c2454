"""In DGMoE-Share two pairs share one module. Two ranks write it once and read it back into both pairs.

test_ep_equality.py shows that training on two ranks equals training on one. Bounds are those of
test_strategy.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from scmoe.experiments.engine.ranks import run_ranks
from tests.support.comparison import TOLERANCE
from tests.support.resuming import HALF, fit, largest_difference, whole
from tests.support.trainings import tiny

pytestmark = pytest.mark.dist

MODEL = (
    "architecture=dgmoe_share model.layers=4 model.dropout=0.1 noisy=true optim.lr=0.01 optim.warmup_steps=2 "
    "trainer.max_steps=6"
)


def uninterrupted_and_resumed(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Returns four runs: with EP 2, uninterrupted and resumed; without randomness, uninterrupted with EP 2 and resumed
    with EP 1."""
    ep2 = tiny(f"{MODEL} strategy.ep_size=2", world_size)
    quiet = f"{MODEL} model.dropout=0 noisy=false".replace("model.dropout=0.1 noisy=true ", "")
    torch.manual_seed(1)
    runs = [fit(ep2, folder / "noisy")]
    torch.manual_seed(2)
    runs.append(fit(ep2, None, folder / "noisy" / f"step={HALF}.ckpt"))
    runs.append(fit(tiny(f"{quiet} strategy.ep_size=2", world_size), folder / "quiet"))
    runs.append(fit(tiny(f"{quiet} strategy.ep_size=1", world_size), None, folder / "quiet" / f"step={HALF}.ckpt"))
    return runs


def test_a_shared_module_is_saved_once_and_resumed_in_any_layout(tmp_path):
    ranks = run_ranks(uninterrupted_and_resumed, 2, tmp_path)
    for uninterrupted, resumed, _, _ in ranks:
        assert all(torch.equal(t, resumed["tensors"][name]) for name, t in uninterrupted["tensors"].items())
    error, name = largest_difference([r[2] for r in ranks], [r[3] for r in ranks])
    assert error <= TOLERANCE, name

    written = set()
    for file in (tmp_path / "quiet" / f"step={HALF}.ckpt").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            written |= set(tensors.keys())
    experts = {name for name in written if name.startswith("model.") and ".experts." in name}
    assert experts == {f"model.model.blocks.0.moe.experts.{w}" for w in ("w_in_eDF", "w_out_eFD")}
    assert {name.split()[0] for name in whole([r[2] for r in ranks]) if "experts" in name} == {
        name.removeprefix("model.model.") for name in experts
    }
