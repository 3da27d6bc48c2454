"""Weights from elsewhere, under our names: transformers' dense GPT-2 and LLaMA, and what `make export` writes.

Only safetensors and JSON on this machine are read: nothing is downloaded, and no pickle is opened.
What becomes of the weights in a model, dense or MoE, is in upcycle.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe.models.llama import NORM_EPS
from scmoe.parallel.checkpoint.export import FORMAT_VERSION


class Checkpoint(NamedTuple):
    """settings: the config's keys that the weights were made with, as far as the files say.

    problems: what is missing, unknown or of another kind, in words; nothing may be loaded where there is one.
    """

    weights: dict[str, Tensor]  # under our names, in the layout of our parameters
    labels: dict[str, str]  # what each is called in the files
    settings: dict[str, Any]
    problems: list[str]


def read_export(file: Path) -> Checkpoint:
    """A file of `make export`, dense or MoE. ValueError: not one."""
    weights, metadata = read_safetensors([file])
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}, allowed: {FORMAT_VERSION}")
    try:
        settings = dict(json.loads(metadata["settings"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its header does not hold the model's settings: {error!r}") from error
    return Checkpoint(weights, {name: name for name in weights}, settings, [])


def read_hf(folder: Path) -> Checkpoint:
    """A folder with config.json and *.safetensors, as transformers' `save_pretrained` writes it. ValueError: none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: config.json cannot be read: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors, the only weights that are read")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in READERS:
        raise ValueError(f"{folder}: model_type is {family!r}, allowed: {', '.join(READERS)}")
    weights, _ = read_safetensors(files)
    try:
        settings, problems, names = READERS[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: config.json is not that of a {family}: {error!r}") from error
    theirs = {name.removeprefix("transformer.").removeprefix("model."): weight for name, weight in weights.items()}
    wanted = {part for parts in names.values() for part in parts}
    unused: tuple[str, ...] = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")  # old files' masks and angles
    if config.get("tie_word_embeddings", family == "gpt2"):
        unused += ("lm_head.weight",)
    problems += [f"{name} is missing" for name in sorted(wanted - theirs.keys())]
    problems += [f"{name} is unknown" for name in sorted(theirs.keys() - wanted) if not name.endswith(unused)]
    checkpoint = Checkpoint({}, {}, settings, problems)
    for ours, parts in names.items():
        found = [theirs[part] for part in parts if part in theirs]
        if len(found) < len(parts):
            continue
        checkpoint.labels[ours] = " + ".join(parts)
        if len({w.shape[1:] for w in found}) > 1 or any(w.dim() == 0 for w in found):
            problems.append(f"{' + '.join(parts)} have shapes {', '.join(str(tuple(w.shape)) for w in found)}")
            continue
        weight = torch.cat(found)
        turned = family == "gpt2" and ".f." in ours and weight.dim() == 2  # its products keep theirs as [in, out]
        checkpoint.weights[ours] = weight.T if turned else weight
    return checkpoint


def read_safetensors(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    weights: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                metadata |= file.metadata() or {}
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return weights, metadata


Names = dict[str, list[str]]  # ours: theirs, which are joined along the first dim

Reading = tuple[dict[str, Any], list[str], Names]  # settings, problems, names


def read_gpt2(config: dict[str, Any]) -> Reading:
    gelu = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    problems = others(
        config,
        {
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
    )
    settings = {
        "model.family": "gpt",
        "model.layers": config["n_layer"],
        "model.dim": config["n_embd"],
        "model.heads": config["n_head"],
        "model.kv_heads": config["n_head"],
        "model.ffn_dim": config.get("n_inner") or 4 * config["n_embd"],
        "model.activation": gelu.get(config.get("activation_function", "gelu_new"), config.get("activation_function")),
        "data.vocab_size": config["vocab_size"],
    }
    names = {"tokens.weight": ["wte.weight"], "positions.weight": ["wpe.weight"]}
    for part in ("weight", "bias"):
        names[f"norm.{part}"] = [f"ln_f.{part}"]
        for i in range(config["n_layer"]):
            attention, mlp, theirs = f"blocks.{i}.sublayers.0", f"blocks.{i}.sublayers.1", f"h.{i}"
            names[f"{attention}.norm.{part}"] = [f"{theirs}.ln_1.{part}"]
            names[f"{attention}.f.qkv.{part}"] = [f"{theirs}.attn.c_attn.{part}"]
            names[f"{attention}.f.out.{part}"] = [f"{theirs}.attn.c_proj.{part}"]
            names[f"{mlp}.norm.{part}"] = [f"{theirs}.ln_2.{part}"]
            names[f"{mlp}.f.w_in.{part}"] = [f"{theirs}.mlp.c_fc.{part}"]
            names[f"{mlp}.f.w_out.{part}"] = [f"{theirs}.mlp.c_proj.{part}"]
    return settings, problems, names


def read_llama(config: dict[str, Any]) -> Reading:
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    flat = {
        **{"rms_norm_eps": 1e-6, **config, **rope},
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "head_dim": config.get("head_dim") or dim // heads,
    }
    problems = others(
        flat,
        {
            "rms_norm_eps": NORM_EPS,
            "rope_theta": 10000.0,
            "rope_type": "default",
            "hidden_act": "silu",
            "head_dim": dim // heads,
            "attention_bias": False,
            "mlp_bias": False,
        },
    )
    settings = {
        "model.family": "llama",
        "model.layers": config["num_hidden_layers"],
        "model.dim": dim,
        "model.heads": heads,
        "model.kv_heads": config.get("num_key_value_heads") or heads,
        "model.ffn_dim": config["intermediate_size"],
        "model.activation": "swiglu",
        "data.vocab_size": config["vocab_size"],
    }
    tied = config.get("tie_word_embeddings", False)
    names = {
        "tokens.weight": ["embed_tokens.weight"],
        "norm.weight": ["norm.weight"],
        "head.weight": ["embed_tokens.weight" if tied else "lm_head.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        attention, mlp, theirs = f"blocks.{i}.sublayers.0", f"blocks.{i}.sublayers.1", f"layers.{i}"
        names[f"{attention}.norm.weight"] = [f"{theirs}.input_layernorm.weight"]
        names[f"{attention}.f.qkv.weight"] = [f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"]
        names[f"{attention}.f.out.weight"] = [f"{theirs}.self_attn.o_proj.weight"]
        names[f"{mlp}.norm.weight"] = [f"{theirs}.post_attention_layernorm.weight"]
        names[f"{mlp}.f.w_in.weight"] = [f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        names[f"{mlp}.f.w_out.weight"] = [f"{theirs}.mlp.down_proj.weight"]
    return settings, problems, names


def others(config: Mapping[str, Any], allowed: Mapping[str, Any]) -> list[str]:
    """What is set otherwise than our models have it."""
    return [
        f"{key} is {config[key]!r}, allowed: {value!r}"
        for key, value in allowed.items()
        if config.get(key, value) != value
    ]


READERS = {"gpt2": read_gpt2, "llama": read_llama}
