"""On two GPUs, over NCCL, ranks compute what one rank computes: exchanges, split weights, saves,
generation.

Every function takes the accelerator, so that it can be tried with `cpu` on a machine without GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.ranks import run_ranks

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

TOLERANCE = 1e-10  # in float64; unlike on a CPU, sums of a GPU have no fixed order
MODEL = "position=pos2 top_k=2"
CASES = {
    "EP 2": "strategy.ep_size=2",
    "EP 2, three chunks": "strategy.ep_size=2 schedule.chunks=3",
    "two copies of the experts": "strategy.ep_size=1",
    "sharded, EP 2": "strategy.ep_size=2 strategy.dense=sharded",
    "sharded, EP 1": "strategy.ep_size=1 strategy.dense=sharded",
}


@pytest.fixture(autouse=True)
def configurations():
    pytest.importorskip("omegaconf", reason="not installed: omegaconf")


def trained(world_size: int, accelerator: str, cases: dict[str, str]) -> list[dict[str, Any]]:
    """Return for each rank the records of all cases."""
    # here, so that this file is collected without omegaconf
    from tests.support.trainings import train_cases

    words = {
        name: f"{MODEL} trainer.accelerator={accelerator} {text}" for name, text in cases.items()
    }
    return run_ranks(train_cases, world_size, words, timeout_s=240)


def test_trainings_equal_those_of_one_rank(accelerator: str = "gpu"):
    from tests.support.comparison import assemble, assert_same

    (one,) = trained(1, accelerator, {"one": ""})
    two = trained(2, accelerator, CASES)
    for name in CASES:
        assert_same([records[name] for records in two], assemble([one["one"]]), TOLERANCE)


def save(rank: int, world_size: int, folder: Path, accelerator: str, words: str) -> None:
    """Train three steps, with a checkpoint of each."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.support.trainings import fit, tiny

    config = tiny(f"{MODEL} trainer.accelerator={accelerator} {words}", world_size)
    fit(config, ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))


def weights(path: Path) -> dict[str, Tensor]:
    from scmoe.parallel.checkpoint.loading import load_model
    from scmoe.training.assembly.model import build_model
    from tests.support.trainings import tiny

    model = build_model(tiny(MODEL)).double()
    load_model(path, model)
    return model.state_dict()


@pytest.mark.parametrize("dense", ["replicated", "sharded"])
def test_checkpoints_written_beside_training_equal_those_of_one_rank(
    dense, tmp_path, accelerator: str = "gpu"
):
    run_ranks(save, 1, tmp_path / "one", accelerator, "")
    words = f"strategy.ep_size=2 strategy.dense={dense} strategy.async_checkpoint=true"
    run_ranks(save, 2, tmp_path / "two", accelerator, words)
    for step in (1, 2, 3):
        one, two = (weights(tmp_path / ranks / f"step={step}.ckpt") for ranks in ("one", "two"))
        for name, weight in one.items():
            # AdamW enlarges rounding
            torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6, msg=name)


def test_texts_equal_those_of_one_rank(tmp_path, accelerator: str = "gpu"):
    from tests.support.commands import command_in_ranks, train_on_text

    prompts = [
        {"prompt": text} for text in ("Peace", "The union of people", "Labor and land. State")
    ]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    )
    run_dir = str(train_on_text(tmp_path, 1, "data.seq_len=48", "trainer.max_steps=3"))
    found = []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.jsonl"
        asked = ("--prompts", f"{tmp_path}/prompts.jsonl", "--out", str(out), "--max-tokens", "12")
        how = (
            f"trainer.devices={world_size}",
            f"trainer.accelerator={accelerator}",
            "trainer.precision=64-true",
        )
        assert command_in_ranks("generate", world_size, run_dir, *asked, *how).code == 0
        found.append(out.read_text())
    assert found[0] == found[1] and found[0].count("\n") == len(prompts)
