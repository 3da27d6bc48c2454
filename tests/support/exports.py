"""This module makes configs of dense models, and writes models as `make export` and as a training
does."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from scmoe.config.fields import Config
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.export import FORMAT_VERSION
from scmoe.weights.pretrained import model_settings
from tests.support.models import tiny, tiny_model

FAMILIES = {"gpt": (), "llama": ("model.family=llama", "model.kv_heads=1")}


def dense(family: str, *overrides: str) -> Config:
    return tiny("moe.architecture=dense", *FAMILIES[family], *overrides)


def export(config: Config, file: Path) -> torch.nn.Module:
    """Write a model of random weights as `make export` does, and return it."""
    model = tiny_model(config)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    header = {"format_version": FORMAT_VERSION, "settings": json.dumps(model_settings(config))}
    save_file(weights, file, metadata=header)
    return model


def write_checkpoint(model: torch.nn.Module, folder: Path, step: int) -> None:
    """Write a checkpoint that holds a network's weights and nothing else."""
    partial = durable.partial_path(folder, "0" * 8)
    partial.mkdir()
    weights = {f"model.model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, partial / "all.safetensors")
    durable.commit(
        partial, folder, step, {"all.safetensors": durable.fingerprint(partial / "all.safetensors")}
    )
