"""The settings that make a model what it is, and their comparison with those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scmoe.config.fields import Config, flatten, show
from scmoe.config.rules import SHORTCUTS
from scmoe.training.build.blocks import PARTS


def check_settings(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """ValueError, naming every key: a checkpoint was made with other settings. A dense one may become any MoE."""
    other = [
        f"{key} is {show(here[key]) if key in here else 'unknown'}, allowed: {show(value)}"
        for key, value in there.items()
        if here.get(key, there) != value and (key, value) != ("moe.architecture", "dense")
    ]
    if other:
        raise ValueError(f"its weights were made with other settings: {'; '.join(other)}")


def settings(config: Config) -> dict[str, Any]:
    """The config's values by key, with those that follow from others."""
    model, moe = config.model, config.moe
    resolved: dict[str, Any] = {"moe.first_position": moe.first_position or moe.position}
    if model.family in PARTS:
        parts = PARTS[model.family](config)
        resolved |= {"model.ffn_dim": parts.ffn_dim, "model.activation": parts.activation}
        resolved |= {"model.kv_heads": model.kv_heads or model.heads}
    return flatten(config) | resolved


def model_settings(config: Config) -> dict[str, Any]:
    """Those that make the network what it is: whoever takes its weights must have the same. An export's header."""
    architecture, keys = config.moe.architecture, ["model.family", "model.layers", "model.dim", "model.heads"]
    if config.model.family == "swin":
        keys += ["model.patch_size", "model.window", "data.image_size", "data.num_classes"]
    else:
        keys += ["model.kv_heads", "model.ffn_dim", "model.activation", "data.vocab_size"]
    keys.append("moe.architecture")
    if architecture != "dense":
        keys += ["moe.num_experts", "moe.top_k", "moe.renormalise", "moe.noisy", "moe.every"]
    if architecture in SHORTCUTS:
        keys += ["moe.position", "moe.first_position", "moe.tap_norm"]
    if architecture in ("shared_expert", "scmoe"):
        keys += ["moe.combine", "moe.coefficient_input"]
    here = settings(config)
    return {key: here[key] for key in keys}
