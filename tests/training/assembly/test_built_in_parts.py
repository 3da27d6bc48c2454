"""A model whose weights are split is built in parts: no rank ever holds more than its part and one
block.

Four ranks build models of which the whole is more, with weights that are drawn and weights from
files, and have the bits of one process. Models of images are in test_swin_ranks.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.engine.ranks import run_ranks
from scmoe.config.load import load_config
from scmoe.weights.hf_config import hf_config
from scmoe.weights.hf_folder import renamed
from tests.support.architectures import overrides
from tests.support.exports import export
from tests.support.models import tiny_model
from tests.support.parts import Built, build_in_parts, split_wire

pytestmark = pytest.mark.ranks

SIZE = (
    *("model.layers=8", "model.dim=32", "model.heads=2", "model.ffn_dim=64", "moe.num_experts=4"),
    *("data.name=synthetic", "data.vocab_size=64", "data.seq_len=16"),
)
SPLIT = (
    "strategy.dense=sharded",
    "strategy.ep_size=2",
    "trainer.devices=4",
    "data.global_batch_size=4",
)
MIXTRAL = "model.family=llama architecture=top_k top_k=2 every=1"
CASES = {
    "drawn": ("position=pos2", None),
    "an export": ("position=pos2", "scmoe:{}/pos2.safetensors"),
    "upcycled": ("position=pos2 model.family=llama", "scmoe:{}/dense.safetensors"),
    "a folder": (MIXTRAL, "hf:{}/hf"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return what models start from: exports of an MoE and of a dense model, and a folder as
    transformers writes it."""
    for name, words in {
        "pos2": "position=pos2",
        "dense": "model.family=llama architecture=dense",
    }.items():
        export(load_config(None, [*SIZE, *overrides(words)]), tmp_path / f"{name}.safetensors")
    (tmp_path / "hf").mkdir()
    config = load_config(None, [*SIZE, *overrides(MIXTRAL)])
    content = hf_config(config, None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    for i, (name, p) in enumerate(tiny_model(config, torch.float32).named_parameters()):
        save_file(
            dict(renamed(content, name, p.detach())), tmp_path / "hf" / f"model-{i}.safetensors"
        )
    return tmp_path


def built(rank: int, world_size: int, folder: Path) -> dict[str, Built]:
    wire, found = split_wire(ep_size=2), {}
    for case, (words, source) in CASES.items():
        config = load_config(None, [*SIZE, *SPLIT, *overrides(words)])
        found[case] = build_in_parts(
            replace(config, init_from=source and source.format(folder)), wire
        )
    return found


def test_no_rank_holds_more_than_its_part_and_a_block(folder):
    for rank in run_ranks(built, 4, folder):
        for case in CASES:
            rank[case].check()
