"""This module makes configs of dense models and writes models of random weights as `make export` does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from scmoe.config.fields import Config
from scmoe.init_from.pretrained import model_settings
from scmoe.parallel.checkpoint.export import FORMAT_VERSION
from tests.support.models import tiny, tiny_model

FAMILIES = {"gpt": (), "llama": ("model.family=llama", "model.kv_heads=1")}


def dense(family: str, *overrides: str) -> Config:
    return tiny("moe.architecture=dense", *FAMILIES[family], *overrides)


def export(config: Config, file: Path) -> torch.nn.Module:
    """Writes a model of random weights as `make export` does, and returns it."""
    model = tiny_model(config)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    header = {"format_version": FORMAT_VERSION, "settings": json.dumps(model_settings(config))}
    save_file(weights, file, metadata=header)
    return model
