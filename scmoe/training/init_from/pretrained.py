"""Reads weights under our names: transformers' dense GPT-2 and LLaMA, and files of `make export`.

Only local safetensors and JSON files are read: no download, no pickle. upcycle.py copies the weights into a model.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe.models.llama import NORM_EPS
from scmoe.parallel.checkpoint.export import read_settings


class Checkpoint(NamedTuple):
    """Weights that were read, and what is known about them.

    problems: messages about what is missing, unknown or different; with any, no weight may be loaded.
    """

    weights: dict[str, Tensor]  # under our names, in the layout of our parameters
    labels: dict[str, str]  # the name of each in the files
    settings: dict[str, Any]  # the config's keys that the weights belong to, as far as the files say
    problems: list[str]


def read_export(file: Path) -> Checkpoint:
    """Read a file of `make export`, dense or MoE. Raises ValueError for any other file."""
    settings, weights = read_settings(file), read_safetensors([file])
    return Checkpoint(weights, {name: name for name in weights}, settings, [])


def read_hf(folder: Path) -> Checkpoint:
    """Read a folder of transformers' `save_pretrained`: config.json and *.safetensors. Raises ValueError for others."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: config.json cannot be read: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights in *.safetensors; other formats are not read")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in READERS:
        raise ValueError(f"{folder}: model_type is {family!r}, allowed: {', '.join(READERS)}")
    weights = read_safetensors(files)
    try:
        settings, problems, names = READERS[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: config.json is not that of a {family}: {error!r}") from error
    theirs = {name.removeprefix("transformer.").removeprefix("model."): weight for name, weight in weights.items()}
    wanted = {part for parts in names.values() for part in parts}
    unused: tuple[str, ...] = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")  # masks and angles in old files
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
        turned = family == "gpt2" and ".f." in ours and weight.dim() == 2  # GPT-2 keeps matrices as [in, out]
        checkpoint.weights[ours] = weight.T if turned else weight
    return checkpoint


def read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return weights


Names = dict[str, list[str]]  # our name: their names, which are concatenated along the first dim

# The parts of a dense block: our names, GPT-2's and LLaMA's.
BLOCK = ("0.norm", "0.f.qkv", "0.f.out", "1.norm", "1.f.w_in", "1.f.w_out")
GPT2_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
LLAMA_BLOCK = (
    *("input_layernorm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"),
)
Reading = tuple[dict[str, Any], list[str], Names]  # settings, problems, names


def read_gpt2(config: dict[str, Any]) -> Reading:
    gelu = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    problems = others(
        config,
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
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
        names |= {f"norm.{part}": [f"ln_f.{part}"], **block_names(GPT2_BLOCK, part, "h", config["n_layer"])}
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
        rms_norm_eps=NORM_EPS,
        rope_theta=10000.0,
        rope_type="default",
        hidden_act="silu",
        head_dim=dim // heads,
        attention_bias=False,
        mlp_bias=False,
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
    names |= block_names(LLAMA_BLOCK, "weight", "layers", config["num_hidden_layers"])
    return settings, problems, names


def block_names(theirs: Sequence[str], part: str, prefix: str, layers: int) -> Names:
    """Return the names of all dense blocks. part: weight or bias. prefix: their name of the list of blocks."""
    return {
        f"blocks.{i}.sublayers.{our}.{part}": [f"{prefix}.{i}.{name}.{part}" for name in their.split()]
        for i in range(layers)
        for our, their in zip(BLOCK, theirs, strict=True)
    }


def others(config: Mapping[str, Any], **allowed: Any) -> list[str]:
    """Return a message for each setting that our models do not support."""
    different = {key: value for key, value in allowed.items() if config.get(key, value) != value}
    return [f"{key} is {config[key]!r}, allowed: {value!r}" for key, value in different.items()]


READERS = {"gpt2": read_gpt2, "llama": read_llama}
