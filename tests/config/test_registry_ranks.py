"""Muon, the architecture of docs/extending.md, and DGMoE-Share, in which two pairs share one
module: two ranks give the weights and moments of one, resumed or not.

The bound is 1e-12 in float64, as in test_ep_equality.py. Muon computes in bfloat16, from moments
that differ by 1e-16: a rounding to bfloat16, 4e-3, would differ for one of 1e13 numbers.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from experiments.engine.ranks import run_ranks
from scmoe.training.assembly.model import build_module
from tests.support.comparison import TOLERANCE
from tests.support.resuming import HALF, fit, largest_difference, whole
from tests.support.trainings import tiny

pytestmark = pytest.mark.ranks

USUAL = "optim.lr=0.01 optim.warmup_steps=2 trainer.max_steps=6"
EXTENSION = "extensions=[docs.examples.my_architecture]"
CASES = {
    "muon": (
        f"{USUAL} position=pos2 top_k=2 optim.name=muon model.family=llama"
        " trainer.gradient_clip=0.25"
    ),
    "shared": f"{USUAL} architecture=dgmoe_share model.layers=4",
    "parallel": (
        f"{USUAL} {EXTENSION} architecture=parallel top_k=2 data.name=counting options.stride=3"
        " optim.name=sgd"
    ),
}
Ends = dict[str, dict[str, Any]]


def on_two(rank: int, world_size: int, folder: Path) -> Ends:
    return {
        name: fit(tiny(f"{text} strategy.ep_size=2", 2), folder / name)
        for name, text in CASES.items()
    }


def on_one(rank: int, world_size: int, folder: Path) -> tuple[Ends, Ends]:
    """Return uninterrupted runs, and the ends of runs that two ranks began."""
    resumed = {
        name: fit(tiny(text), None, folder / name / f"step={HALF}.ckpt")
        for name, text in CASES.items()
    }
    return {name: fit(tiny(text)) for name, text in CASES.items()}, resumed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("begun")


@pytest.fixture(scope="module")
def ends(folder) -> tuple[list[Ends], Ends, Ends]:
    two = run_ranks(on_two, 2, folder)
    ((one, resumed),) = run_ranks(on_one, 1, folder)
    return two, one, resumed


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case, ends):
    two, one, resumed = ends
    ranks = [rank[case] for rank in two]
    for end in (one[case], resumed[case]):
        error, name = largest_difference([end], ranks)
        assert error <= TOLERANCE, name
    assert sum(name.endswith(("momentum_buffer", "exp_avg")) for name in whole(ranks)) > 2, (
        "moments are compared"
    )


def test_a_shared_module_is_saved_once(ends, folder):
    written = set()
    for file in (folder / "shared" / f"step={HALF}.ckpt").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            written |= set(tensors.keys())
    experts = {name for name in written if name.startswith("model.") and ".experts." in name}
    assert experts == {f"model.model.blocks.0.moe.experts.{w}" for w in ("w_in_eDF", "w_out_eFD")}


def test_a_spawned_rank_imports_the_extension(tmp_path):
    """It gets the module pickled, and reads no configuration."""
    (built,) = run_ranks(pickled, 1)
    assert run_ranks(unpickled, 1, built) == ["ParallelBlock"]


def pickled(rank: int, world_size: int) -> bytes:
    return pickle.dumps(build_module(tiny(f"{EXTENSION} architecture=parallel")))


def unpickled(rank: int, world_size: int, built: bytes) -> str:
    assert "docs.examples.my_architecture" not in sys.modules
    module = pickle.loads(built)
    module.configure_model()
    return type(module.model.blocks[0]).__name__
