"""On two GPUs, over NCCL, ranks compute what one rank computes: exchanges, split weights, saves,
generation.

Every function takes the accelerator, so that it can be tried with `cpu` on a machine without GPUs.
Two hops over nodes of several ranks need four GPUs; here each hop runs between the two ranks while
the other one is within a rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.engine.ranks import run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

TOLERANCE = 1e-10  # in float64; unlike on a CPU, sums of a GPU have no fixed order
MODEL = "position=pos2 top_k=2"
CASES = {
    "flat": "strategy.ep_size=2 strategy.exchange=flat",
    "flat, three chunks": "strategy.ep_size=2 schedule.chunks=3",
    "two copies of the experts": "strategy.ep_size=1",
    "sharded, EP 2": "strategy.ep_size=2 strategy.dense=sharded",
    "sharded, EP 1": "strategy.ep_size=1 strategy.dense=sharded",
}


@pytest.fixture(autouse=True)
def configurations():
    pytest.importorskip("omegaconf", reason="not installed: omegaconf")


def trained(world_size: int, accelerator: str, cases: dict[str, str]) -> list[dict[str, Any]]:
    """Returns for each rank the records of all cases."""
    from tests.support.trainings import (
        train_cases,
    )  # here, so that this file is collected without omegaconf

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


BY_RANK = torch.tensor([[3, 1], [0, 2]])  # rows by [sender, receiver]


def hop(rank: int, world_size: int, accelerator: str) -> None:
    """Rows and gradients of two transfers in flight are bit-identical to those of a flat exchange."""
    from scmoe.moe.dispatcher import Traffic
    from scmoe.parallel.wire.all_to_all import Exchange, Transfer, all_to_all
    from scmoe.parallel.wire.hierarchical import hierarchical

    device = torch.device("cpu" if accelerator == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    counted = Traffic(BY_RANK[rank].tolist(), BY_RANK[:, rank].tolist(), BY_RANK)

    def moved(exchange: Exchange, traffic: Traffic | None) -> list[Tensor]:
        rows = [
            torch.randn(4 if traffic is None else sum(traffic.sent), 8, device=device)
            for _ in range(2)
        ]
        rows = [own.requires_grad_() for own in rows]
        transfers = [Transfer(exchange, traffic).start(own) for own in rows]
        arrived = [transfer.wait() for transfer in transfers]
        sum((own * torch.randn_like(own)).sum() for own in arrived).backward()
        return [*arrived, *(own.grad for own in rows)]

    for places in (1, 2):
        ranks = torch.arange(world_size).view(-1, places)
        within, between = (
            dist.new_subgroups_by_enumeration(r.tolist())[0] for r in (ranks, ranks.T)
        )
        for traffic in (None, counted):
            found = []
            for exchange in (all_to_all(dist.group.WORLD), hierarchical(within, between)):
                torch.manual_seed(rank)
                found.append(moved(exchange, traffic))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (places, traffic)
    dist.destroy_process_group()


def test_each_of_two_hops_moves_the_rows_of_a_flat_exchange(accelerator: str = "gpu"):
    run_ranks(hop, 2, accelerator)


def save(rank: int, world_size: int, folder: Path, accelerator: str, words: str) -> None:
    """Trains three steps, with a checkpoint of each."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.support.trainings import fit, tiny

    config = tiny(f"{MODEL} trainer.accelerator={accelerator} {words}", world_size)
    fit(config, ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))


def weights(path: Path) -> dict[str, Tensor]:
    from scmoe.parallel.checkpoint.loading import load_model
    from scmoe.parallel.mesh import ParallelContext
    from scmoe.training.assembly.model import build_model
    from tests.support.trainings import tiny

    model = build_model(tiny(MODEL), ParallelContext()).double()
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
            torch.testing.assert_close(
                two[name], weight, rtol=0, atol=1e-6, msg=name
            )  # AdamW enlarges rounding


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
