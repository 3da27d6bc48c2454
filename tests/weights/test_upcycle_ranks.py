"""An upcycled dense checkpoint trains on expert-parallel ranks from the dense model's loss, and
resumes without it. A folder of LongCat-Flash gives every number of ranks the same first loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.engine.ranks import run_ranks
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.run.resume import resumption
from scmoe.training.run.train import train
from scmoe.weights.hf_folder import write_folder
from tests.support.architectures import LATENT_ATTENTION, overrides
from tests.support.exports import dense, export, write_checkpoint
from tests.support.models import tiny, tiny_model
from tests.support.trainings import fit

pytestmark = pytest.mark.ranks

TRAINED = (
    *("model.layers=2", "model.dim=16", "model.heads=2", "model.ffn_dim=24", "data.name=synthetic"),
    *("data.vocab_size=64", "data.seq_len=12", "data.global_batch_size=8", "moe.num_experts=4"),
    *(
        "moe.capacity_factor=null",
        "trainer.accelerator=cpu",
        "trainer.max_steps=1",
        "trainer.progress=false",
    ),
    *("trainer.threads=1", "logger.mode=disabled"),
)
CASES = {
    "dense": ("llama", "moe.architecture=dense"),
    "top-2": ("llama", "moe.architecture=top_k moe.top_k=2"),
    "pos2": ("gpt", "moe.position=pos2"),
    "moe": ("moe", "moe.top_k=2 moe.zero_experts=3"),
    "dense gpt": ("gpt", "moe.architecture=dense"),
    "longcat": (
        "longcat",
        " ".join(overrides(LATENT_ATTENTION["longcat"]))
        + " moe.router=longcat moe.zero_experts=2 moe.ffn_dim=32",
    ),
}


def config_of(case: str, world_size: int, folder: Path, *further: str):
    source, words = CASES[case]
    weights = (
        f"hf:{folder}/longcat" if source == "longcat" else f"scmoe:{folder}/{source}.safetensors"
    )
    family = "llama" if source in ("llama", "longcat") else "gpt"
    words += f" model.family={family} trainer.devices={world_size} init_from={weights}"
    words += " model.kv_heads=1" if source == "llama" else ""
    return load_config(None, [*TRAINED, *words.split(), *further])


def first_losses(rank: int, world_size: int, folder: Path, cases: list[str]) -> dict[str, float]:
    losses = {}
    for case in cases:
        config = config_of(case, world_size, folder, "trainer.precision=64-true")
        losses[case] = fit(config).callback_metrics["train/loss"].item()
    return losses


@pytest.fixture
def folder(tmp_path) -> Path:
    for family in ("gpt", "llama"):
        export(dense(family), tmp_path / f"{family}.safetensors")
    export(
        tiny("moe.num_experts=4", "moe.top_k=2", "moe.zero_experts=3"), tmp_path / "moe.safetensors"
    )
    config = replace(config_of("longcat", 1, tmp_path), init_from=None)
    write_checkpoint(tiny_model(config, torch.float32), tmp_path / "step=0.ckpt", step=0)
    from_scratch = replace(config, init_from=None)  # the folder does not exist yet
    kind = write_folder(
        tmp_path / "step=0.ckpt",
        tmp_path / "longcat",
        from_scratch,
        build_model_on_meta(from_scratch),
    )
    assert kind == "longcat_flash"
    return tmp_path


def test_two_ranks_start_with_the_dense_models_loss(folder):
    """Float64 sums in another order differ by about 1e-12 of a loss of about 6."""
    (one,) = run_ranks(first_losses, 1, folder, list(CASES))
    for two in run_ranks(first_losses, 2, folder, ["top-2", "pos2", "longcat", "moe"]):
        assert all(abs(two[case] - one[case]) < 1e-11 for case in ("longcat", "moe"))
        for case, expected in (("top-2", "dense"), ("pos2", "dense gpt")):
            for losses in (one, two):
                assert abs(losses[case] - one[expected]) < 1e-11, case
    assert min(abs(one[case] - one["dense gpt"]) for case in ("dense", "longcat")) > 1e-3


def start_and_resume(rank: int, world_size: int, folder: Path) -> tuple[int, int]:
    config = config_of(
        "moe", world_size, folder, f"runs_dir={folder}/runs", "trainer.checkpoint_every=1"
    )
    first = train(config)
    (folder / "moe.safetensors").unlink()
    config, resumed = resumption(Path(first["run_dir"]), ["trainer.max_steps=2"])
    assert config.moe.zero_experts == 3
    with pytest.raises(ConfigError, match=r"moe\.zero_experts is 2, allowed: 3"):
        resumption(Path(first["run_dir"]), ["moe.zero_experts=2"])
    last = train(config, (), resumed)
    return first["steps"], last["steps"]


def test_a_run_resumes_without_the_file_that_it_started_from(folder):
    assert run_ranks(start_and_resume, 1, folder) == [(1, 2)]
