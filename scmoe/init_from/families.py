"""The models of transformers that have an equivalent here: GPT-2, LLaMA, Mixtral, Qwen2-MoE.

For each family: our settings for its config.json, settings that our models do not support, and names of its weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scmoe.models.decoder import NORM_EPS

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
    settings, problems = llama_settings(config)
    names = outer_names(config) | block_names(LLAMA_BLOCK, "weight", "layers", config["num_hidden_layers"])
    return settings, problems, names


def llama_settings(config: dict[str, Any], **allowed: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that LLaMA and its relatives share, and problems. allowed: of this relative alone."""
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
        **allowed,
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
    return settings, problems


def outer_names(config: dict[str, Any]) -> Names:
    """Return the names of everything around the blocks of LLaMA and its relatives."""
    tied = config.get("tie_word_embeddings", False)
    return {
        "tokens.weight": ["embed_tokens.weight"],
        "norm.weight": ["norm.weight"],
        "head.weight": ["embed_tokens.weight" if tied else "lm_head.weight"],
    }


def read_mixtral(config: dict[str, Any]) -> Reading:
    """Mixtral: standard top-k in every block. One expert would have the weight 1 there, and its probability here."""
    experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]
    settings, problems = llama_settings(config, sliding_window=None)
    if top_k < 2:
        problems.append(f"num_experts_per_tok is {top_k}, allowed: 2 or more")
    settings |= moe_settings("top_k", experts, top_k, True, 1)
    moe, theirs = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    return settings, problems, outer_names(config) | moe_names(config["num_hidden_layers"], 1, experts, moe, theirs)


def read_qwen2_moe(config: dict[str, Any]) -> Reading:
    """Qwen2-MoE: a shared expert with a sigmoid gate, which is CG-1 of the shared-expert architecture."""
    experts, top_k, every = config["num_experts"], config["num_experts_per_tok"], config.get("decoder_sparse_step", 1)
    width = config["intermediate_size"]
    settings, problems = llama_settings(
        config,
        qkv_bias=False,
        use_sliding_window=False,
        mlp_only_layers=[],
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
    )
    renormalise = config.get("norm_topk_prob", False)
    if every not in (1, 2) or (top_k == 1 and renormalise):
        problems.append("decoder_sparse_step allowed: 1 or 2; norm_topk_prob allowed for one expert per token: false")
    settings |= moe_settings("shared_expert", experts, top_k, renormalise or top_k == 1, every)
    settings |= {"moe.combine": "cg1", "moe.coefficient_input": "current"}
    theirs = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    names = moe_names(config["num_hidden_layers"], every, experts, "mlp", theirs, shared="shared_expert")
    return settings, problems, outer_names(config) | names


def moe_settings(architecture: str, experts: int, top_k: int, renormalise: bool, every: int) -> dict[str, Any]:
    return {
        "moe.architecture": architecture,
        "moe.num_experts": experts,
        "moe.top_k": top_k,
        "moe.renormalise": renormalise,
        "moe.noisy": False,
        "moe.every": every,
    }


def moe_names(
    layers: int, every: int, experts: int, moe: str, theirs: dict[str, str], shared: str | None = None
) -> Names:
    """Return the names of all blocks with an MoE: of pairs of a dense and an MoE layer where every is 2.

    moe: their name of the MoE module. theirs: their names of an expert's three matrices. shared: of the shared expert.
    """
    names: Names = {}
    attention, dense = LLAMA_BLOCK[:3], LLAMA_BLOCK[3:]
    for block in range(layers // every):
        sublayers = [attention, dense, attention] if every == 2 else [attention]
        for i, parts in enumerate(sublayers):
            layer = every * block + (i == 2)
            for ours, name in zip(BLOCK[:3] if i != 1 else BLOCK[3:], parts, strict=True):
                own = f"blocks.{block}.sublayers.{i}{ours[1:]}.weight"
                names[own] = [f"layers.{layer}.{part}.weight" for part in name.split()]
        last = f"layers.{every * block + every - 1}"
        one = [f"{last}.{moe}.experts.{e}" for e in range(experts)]
        names |= {
            f"blocks.{block}.norm.weight": [f"{last}.post_attention_layernorm.weight"],
            f"blocks.{block}.moe.router.gate.weight": [f"{last}.{moe}.gate.weight"],
            f"blocks.{block}.moe.experts.w_in_eDF": [
                f"{expert}.{theirs[part]}.weight" for expert in one for part in ("gate", "up")
            ],
            f"blocks.{block}.moe.experts.w_out_eFD": [f"{expert}.{theirs['down']}.weight" for expert in one],
        }
        if shared is not None:
            own, name = f"blocks.{block}.shared_expert", f"{last}.{moe}.{shared}"
            names |= {
                f"{own}.w_in.weight": [f"{name}.gate_proj.weight", f"{name}.up_proj.weight"],
                f"{own}.w_out.weight": [f"{name}.down_proj.weight"],
                f"blocks.{block}.coefficient.gate.weight": [f"{name}_gate.weight"],
            }
    return names


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
