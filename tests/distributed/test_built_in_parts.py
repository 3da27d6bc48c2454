"""A model whose weights are split is built in parts: no rank ever holds more than its part and one block.

Bytes of storages are counted while four ranks build models whose whole is more than that, with weights that are drawn
and weights from files. Each rank's part is bit-identical to the same part of the model of one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.models.units import units
from scmoe.moe.experts import Experts
from scmoe.parallel.dense_shards import local, put, with_dense_mesh
from scmoe.parallel.mesh import ParallelContext, build_context
from scmoe.testbed.dry_run.counting import Counting
from scmoe.testbed.ranks import run_ranks
from scmoe.training.build.model import build_model_to_train
from scmoe.training.hf.config import hf_config
from scmoe.training.hf.folder import renamed
from tests.support.architectures import overrides
from tests.support.exports import export
from tests.support.models import tiny_model

pytestmark = pytest.mark.dist

SIZE = (
    *("model.layers=8", "model.dim=32", "model.heads=2", "moe.num_experts=4", "trainer.devices=4"),
    *("strategy.dense=sharded", "strategy.ep_size=2", "data.global_batch_size=4"),
)
TEXT = ("model.ffn_dim=64", "data.name=synthetic", "data.vocab_size=64", "data.seq_len=16")
MIXTRAL = "model.family=llama architecture=top_k top_k=2 every=1"
IMAGES = "model.family=swin model.dim=8 model.layers=16 model.patch_size=2 model.window=2 data.name=digits data.image_size=32"
CASES = {
    "drawn": (*TEXT, "moe.position=pos2"),
    "drawn, of images": tuple(overrides(IMAGES)),
    "an export": (*TEXT, "moe.position=pos2", "init_from=scmoe:{}/pos2.safetensors"),
    "an export, upcycled": (*TEXT, "model.family=llama", "moe.position=pos2", "init_from=scmoe:{}/dense.safetensors"),
    "a folder": (*TEXT, *overrides(MIXTRAL), "init_from=hf:{}/hf"),
}


def config_of(case: str, folder: Path) -> Config:
    return load(None, [*SIZE, *(word.format(folder) for word in CASES[case])])


class OnHost(Counting):
    """Leaves out the meta device."""

    def add(self, tensors: Iterable[Any]) -> None:
        super().add(t for t in tensors if not t.is_meta)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def bytes_of(some: Iterable[Tensor]) -> int:
    return sum(local(t).nbytes for t in some)


def built(rank: int, world_size: int, folder: Path) -> dict[str, tuple[int, int, list[str]]]:
    """Returns for each case the peak, the bytes of this rank's part, and names of tensors that one process has other."""
    dist.init_process_group("gloo")
    device, timeout = torch.device("cpu"), timedelta(seconds=60)
    context = with_dense_mesh(build_context(2, device, timeout), "sharded", world_size, device, timeout)
    found = {}
    for case in CASES:
        with OnHost() as counting:
            model = build_model_to_train(config_of(case, folder), context)
        expected, other = load_file(folder / f"{case}.expected"), []
        for name, t in tensors(model).items():
            module, same = model.get_submodule(name.rpartition(".")[0]), torch.empty_like(t)
            ids = module.expert_ids if isinstance(module, Experts) else range(len(expected[name]))
            put(same, expected[name][ids.start : ids.stop])
            other += [name] * (not torch.equal(local(same), local(t)))
        found[case] = counting.peak.total(), bytes_of(tensors(model).values()), other
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Has the files to start from: exports of an MoE and of a dense model, and a folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("files")
    for name, words in {"pos2": "position=pos2", "dense": "model.family=llama architecture=dense"}.items():
        export(load(None, [*SIZE[:4], *TEXT, *overrides(words)]), folder / f"{name}.safetensors")
    hf = folder / "hf"
    hf.mkdir()
    config = load(None, [*SIZE[:4], *TEXT, *overrides(MIXTRAL)])
    content = hf_config(config, None)
    (hf / "config.json").write_text(json.dumps(content))
    for i, (name, p) in enumerate(tiny_model(config, torch.float32).named_parameters()):
        save_file(dict(renamed(content, name, p.detach())), hf / f"model-{i}.safetensors")
    return folder


def test_no_rank_holds_more_than_its_part_and_a_block(folder):
    whole, block = {}, {}
    for case in CASES:
        model = build_model_to_train(config_of(case, folder), ParallelContext())
        whole[case] = bytes_of(tensors(model).values())
        block[case] = max(bytes_of({p for m in unit for p in m.parameters()}) for unit in units(model))
        save_file(tensors(model), folder / f"{case}.expected")
    for rank in run_ranks(built, 4, folder):
        for case, (peak, part, other) in rank.items():
            print(case, "whole", whole[case], "block", block[case], "part", part, "peak", peak)
            assert not other, case
            assert part <= peak <= part + block[case] < whole[case], case
