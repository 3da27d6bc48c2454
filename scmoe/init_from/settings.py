"""Collects the settings that determine a model, and compares them with those of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from scmoe.config.fields import Config
from scmoe.config.leaves import flatten, show
from scmoe.config.registry import ARCHITECTURES, FAMILIES
from scmoe.config.rules import SHORTCUTS
from scmoe.training.assembly.blocks import PARTS


def check_settings(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise ValueError naming all keys in which a checkpoint's settings differ. A dense one may become any MoE."""
    other = [
        f"{key} is {show(here[key]) if key in here else 'unknown'}, allowed: {show(value)}"
        for key, value in there.items()
        if here.get(key, there) != value and (key, value) != ("moe.architecture", "dense")
    ]
    if other:
        raise ValueError(f"its weights belong to a model with other settings: {'; '.join(other)}")


def settings(config: Config) -> dict[str, Any]:
    """Return the config's values by key, with null resolved where other values determine it."""
    model, moe = config.model, config.moe
    resolved: dict[str, Any] = {"moe.first_position": moe.first_position or moe.position}
    if model.family in PARTS:
        parts = PARTS[model.family](config)
        resolved |= {"model.ffn_dim": parts.ffn_dim, "model.activation": parts.activation}
        resolved |= {"model.kv_heads": model.kv_heads or model.heads}
    return flatten(config) | resolved


def model_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a model must share to take these weights. An export has them in its header."""
    architecture, keys = config.moe.architecture, ["model.family", "model.layers", "model.dim", "model.heads"]
    if config.model.family in FAMILIES.images:
        keys += ["model.patch_size", "model.window", "data.image_size", "data.num_classes"]
    else:
        keys += ["model.kv_heads", "model.ffn_dim", "model.activation", "data.vocab_size"]
    keys.append("moe.architecture")
    if architecture != "dense":
        keys += ["moe.num_experts", "moe.top_k", "moe.renormalise", "moe.noisy", "moe.every"]
    own = architecture not in ARCHITECTURES.built_in  # an extension's, which may read all of these
    if architecture in SHORTCUTS or own:
        keys += ["moe.position", "moe.first_position", "moe.tap_norm"]
    if architecture in ("shared_expert", "scmoe") or own:
        keys += ["moe.combine", "moe.coefficient_input"]
    if config.extensions:
        keys.append("options")
    here = settings(config)
    return {key: here[key] for key in keys}
