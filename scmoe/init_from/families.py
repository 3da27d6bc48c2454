"""The models of transformers that have an equivalent here: GPT-2, LLaMA, Mixtral, Qwen2-MoE.

KEYS and ALWAYS relate a config.json to our configuration, for reading (READERS) and for writing (runs/hf_folder.py).
For a config.json, a reader returns our settings, settings that our models do not support, and the names of its weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scmoe.models.decoder import NORM_EPS

Names = dict[str, list[str]]  # our name: their names, which are concatenated along the first dim
Reading = tuple[dict[str, Any], list[str], Names]  # settings, problems, names

LLAMA_KEYS = {  # our key: theirs
    "model.layers": "num_hidden_layers",
    "model.dim": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.ffn_dim": "intermediate_size",
    "data.vocab_size": "vocab_size",
}
KEYS = {
    "gpt2": {
        "model.layers": "n_layer",
        "model.dim": "n_embd",
        "model.heads": "n_head",
        "model.ffn_dim": "n_inner",
        "data.vocab_size": "vocab_size",
    },
    "llama": LLAMA_KEYS,
    "mixtral": {**LLAMA_KEYS, "moe.num_experts": "num_local_experts", "moe.top_k": "num_experts_per_tok"},
    "qwen2_moe": {
        **LLAMA_KEYS,
        "moe.num_experts": "num_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.renormalise": "norm_topk_prob",
        "moe.every": "decoder_sparse_step",
    },
}
ALWAYS: dict[str, dict[str, Any]] = {  # values that our models have
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"mlp_only_layers": [], "qkv_bias": False, "use_sliding_window": False},
}
PLAIN_ROUTER = {"moe.router": "softmax", "moe.router_scale": 1.0, "moe.noisy": False}
# The parts of attention and MLP: our names, GPT-2's and LLaMA's.
OURS = (("norm", "f.qkv", "f.out"), ("norm", "f.w_in", "f.w_out"))
GPT2 = (("ln_1", "attn.c_attn", "attn.c_proj"), ("ln_2", "mlp.c_fc", "mlp.c_proj"))
LLAMA = (
    ("input_layernorm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"),
)


def read_gpt2(config: dict[str, Any]) -> Reading:
    gelu = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    given = {**config, "n_inner": config.get("n_inner") or 4 * config["n_embd"]}
    allowed = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    problems = others(config, allowed | {"add_cross_attention": False, "tie_word_embeddings": True})
    settings = {ours: given[theirs] for ours, theirs in KEYS["gpt2"].items()} | {
        "model.family": "gpt",
        "model.kv_heads": config["n_head"],
        "model.activation": gelu.get(config.get("activation_function", "gelu_new"), config.get("activation_function")),
    }
    names = {"tokens.weight": ["wte.weight"], "positions.weight": ["wpe.weight"]}
    for part in ("weight", "bias"):
        names[f"norm.{part}"] = [f"ln_f.{part}"]
        for block in range(config["n_layer"]):
            for i in (0, 1):
                names |= sublayer_names(block, i, f"h.{block}", GPT2, part)
    return settings, problems, names


def read_llama(config: dict[str, Any]) -> Reading:
    settings, problems = llama_settings("llama", config)
    names = outer_names(config)
    for block in range(settings["model.layers"]):
        for i in (0, 1):
            names |= sublayer_names(block, i, f"layers.{block}", LLAMA)
    return settings, problems, names


def read_mixtral(config: dict[str, Any]) -> Reading:
    """Mixtral: standard top-k in every block. One expert would have the weight 1 there, and its probability here."""
    settings, problems = llama_settings("mixtral", config)
    if settings["moe.top_k"] < 2:
        problems.append(f"num_experts_per_tok is {settings['moe.top_k']}, allowed: 2 or more")
    settings |= {"moe.architecture": "top_k", "moe.renormalise": True, "moe.every": 1, **PLAIN_ROUTER}
    return settings, problems, outer_names(config) | moe_names(settings, "block_sparse_moe", ("w1", "w3", "w2"))


def read_qwen2_moe(config: dict[str, Any]) -> Reading:
    """Qwen2-MoE: a shared expert with a sigmoid gate, which is CG-1 of the shared-expert architecture."""
    config, width = {"decoder_sparse_step": 1, "norm_topk_prob": False, **config}, config["intermediate_size"]
    settings, problems = llama_settings("qwen2_moe", config)
    problems += others(config, {"moe_intermediate_size": width, "shared_expert_intermediate_size": width})
    one = settings["moe.top_k"] == 1
    if settings["moe.every"] not in (1, 2) or (one and settings["moe.renormalise"]):
        problems.append("decoder_sparse_step allowed: 1 or 2; norm_topk_prob allowed for one expert per token: false")
    settings |= {"moe.architecture": "shared_expert", "moe.renormalise": one or settings["moe.renormalise"]}
    settings |= {"moe.combine": "cg1", "moe.coefficient_input": "current", **PLAIN_ROUTER}
    return settings, problems, outer_names(config) | moe_names(settings, "mlp", ("gate_proj", "up_proj", "down_proj"))


def llama_settings(family: str, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of LLaMA or a relative, and problems."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    flat = {
        **{"rms_norm_eps": 1e-6, **config, **rope},
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "head_dim": config.get("head_dim") or dim // heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
    }
    allowed = {"rms_norm_eps": NORM_EPS, "rope_theta": 10000.0, "rope_type": "default", "hidden_act": "silu"}
    problems = others(flat, {**allowed, "head_dim": dim // heads, **ALWAYS["llama"], **ALWAYS[family]})
    settings = {ours: flat[theirs] for ours, theirs in KEYS[family].items()}
    return settings | {"model.family": "llama", "model.activation": "swiglu", "model.attention": "full"}, problems


def others(config: Mapping[str, Any], allowed: Mapping[str, Any]) -> list[str]:
    """Return a message for each setting that our models do not support."""
    different = {key: value for key, value in allowed.items() if config.get(key, value) != value}
    return [f"{key} is {config[key]!r}, allowed: {value!r}" for key, value in different.items()]


def outer_names(config: dict[str, Any]) -> Names:
    """Return the names of everything around the blocks of LLaMA and its relatives."""
    tied = config.get("tie_word_embeddings", False)
    return {
        "tokens.weight": ["embed_tokens.weight"],
        "norm.weight": ["norm.weight"],
        "head.weight": ["embed_tokens.weight" if tied else "lm_head.weight"],
    }


def sublayer_names(block: int, i: int, layer: str, theirs: tuple[tuple[str, ...], ...], part: str = "weight") -> Names:
    """Return the names of sublayer i of a block: attention where i is even, an MLP where it is odd. part: or bias."""
    return {
        f"blocks.{block}.sublayers.{i}.{our}.{part}": [f"{layer}.{name}.{part}" for name in their.split()]
        for our, their in zip(OURS[i % 2], theirs[i % 2], strict=True)
    }


def moe_names(settings: Mapping[str, Any], moe: str, matrices: tuple[str, str, str]) -> Names:
    """Return the names of all blocks with an MoE: of pairs of a dense and an MoE layer where moe.every is 2.

    moe: their name of the MoE module. matrices: their names of an expert's gate, up and down projections.
    """
    names: Names = {}
    every, (gate, up, down) = settings["moe.every"], matrices
    for block in range(settings["model.layers"] // every):
        for i in range(2 * every - 1):
            names |= sublayer_names(block, i, f"layers.{every * block + i // 2}", LLAMA)
        own, last = f"blocks.{block}", f"layers.{every * block + every - 1}"
        experts = [f"{last}.{moe}.experts.{e}" for e in range(settings["moe.num_experts"])]
        names |= {
            f"{own}.norm.weight": [f"{last}.post_attention_layernorm.weight"],
            f"{own}.moe.router.gate.weight": [f"{last}.{moe}.gate.weight"],
            f"{own}.moe.experts.w_in_eDF": [f"{expert}.{part}.weight" for expert in experts for part in (gate, up)],
            f"{own}.moe.experts.w_out_eFD": [f"{expert}.{down}.weight" for expert in experts],
        }
        if settings["moe.architecture"] == "shared_expert":
            shared = f"{last}.{moe}.shared_expert"
            names |= {
                f"{own}.shared_expert.w_in.weight": [f"{shared}.{part}.weight" for part in (gate, up)],
                f"{own}.shared_expert.w_out.weight": [f"{shared}.{down}.weight"],
                f"{own}.coefficient.gate.weight": [f"{shared}_gate.weight"],
            }
    return names


READERS = {"gpt2": read_gpt2, "llama": read_llama, "mixtral": read_mixtral, "qwen2_moe": read_qwen2_moe}


def in_our_layout(family: str, ours: str, weight: Tensor, experts: int) -> Tensor:
    """Return a weight of theirs, its parts concatenated, as our parameter `ours` has it. experts: how many it has."""
    if ours.endswith(("w_in_eDF", "w_out_eFD")):  # theirs: one expert's [out, in] below the other
        return weight.unflatten(0, (experts, -1)).transpose(1, 2)
    return weight.T if is_turned(family, ours, weight) else weight


def in_their_layout(
    family: str, ours: str, weight: Tensor, names: list[str], settings: Mapping[str, Any]
) -> list[Tensor]:
    """Return our parameter as the parts that they keep under these names, each with memory of its own."""
    if ours.endswith(("w_in_eDF", "w_out_eFD")):
        weight = weight.transpose(1, 2).flatten(0, 1)
    elif is_turned(family, ours, weight):
        weight = weight.T
    sizes = [len(weight) // len(names)] * len(names)
    if len(names) == 3:  # Q, K and V of grouped queries
        keys = settings["model.dim"] // settings["model.heads"] * settings["model.kv_heads"]
        sizes = [settings["model.dim"], keys, keys]
    return [part.clone(memory_format=torch.contiguous_format) for part in weight.split(sizes)]


def is_turned(family: str, ours: str, weight: Tensor) -> bool:
    return family == "gpt2" and ".f." in ours and weight.dim() == 2  # GPT-2 keeps matrices as [in, out]
