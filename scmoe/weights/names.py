"""The names and the layout of weights: ours, and those in the files of transformers' models.

One of our parameters is made of one or more of their tensors, concatenated along the first dim.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Names = dict[str, list[str]]  # our name: their names

# The parts of attention and MLP: our names, GPT-2's and LLaMA's.
OUR_LAYERS = (("norm", "f.qkv", "f.out"), ("norm", "f.w_in", "f.w_out"))
GPT2_LAYERS = (("ln_1", "attn.c_attn", "attn.c_proj"), ("ln_2", "mlp.c_fc", "mlp.c_proj"))
LLAMA = (
    ("input_layernorm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"),
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LATENT = {  # our names of latent attention's weights, and theirs
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "gate": "gate_proj",
    "out": "o_proj",
}


def outer_names(config: dict[str, Any]) -> Names:
    """Return the names of everything around the blocks of LLaMA and its relatives."""
    tied = config.get("tie_word_embeddings", False)
    return {
        "tokens.weight": ["embed_tokens.weight"],
        "norm.weight": ["norm.weight"],
        "head.weight": ["embed_tokens.weight" if tied else "lm_head.weight"],
    }


def sublayer_names(
    block: int, i: int, layer: str, theirs: tuple[tuple[str, ...], ...], part: str = "weight"
) -> Names:
    """Return the names of sub-layer i of a block: attention if i is even, an MLP if it is odd.

    theirs: GPT2_LAYERS or LLAMA. part: weight or bias.
    """
    return {
        f"blocks.{block}.sublayers.{i}.{our}.{part}": [
            f"{layer}.{name}.{part}" for name in their.split()
        ]
        for our, their in zip(OUR_LAYERS[i % 2], theirs[i % 2], strict=True)
    }


def moe_names(settings: Mapping[str, Any], moe: str, matrices: tuple[str, str, str]) -> Names:
    """Return the names of all blocks with an MoE, each with the dense layers before it.

    moe: their name of the MoE module. matrices: their names of an expert's gate, up and down
    projections.
    """
    names: Names = {}
    every = settings["moe.every"]
    for number in range(settings["model.layers"] // every):
        for i in range(2 * every - 1):
            names |= sublayer_names(number, i, f"layers.{every * number + i // 2}", LLAMA)
        block = f"blocks.{number}"
        last = f"layers.{every * number + every - 1}"
        names[f"{block}.norm.weight"] = [f"{last}.post_attention_layernorm.weight"]
        names[f"{block}.moe.router.gate.weight"] = [f"{last}.{moe}.gate.weight"]
        names |= expert_names(block, f"{last}.{moe}", settings["moe.num_experts"], matrices)
        if settings["moe.architecture"] == "shared_expert":
            names |= mlp_names(f"{block}.shared_expert", f"{last}.{moe}.shared_expert")
            names[f"{block}.coefficient.gate.weight"] = [f"{last}.{moe}.shared_expert_gate.weight"]
    return names


def expert_names(
    block: str, moe: str, experts: int, matrices: tuple[str, ...] = PROJECTIONS
) -> Names:
    """Return the names of the routed experts of one block. block: our name. moe: theirs."""
    gate, up, down = matrices
    each = [f"{moe}.experts.{e}" for e in range(experts)]
    return {
        f"{block}.moe.experts.w_in_eDF": [
            f"{expert}.{part}.weight" for expert in each for part in (gate, up)
        ],
        f"{block}.moe.experts.w_out_eFD": [f"{expert}.{down}.weight" for expert in each],
    }


def mlp_names(ours: str, theirs: str) -> Names:
    """Return the names of an MLP. ours, theirs: the names of the module."""
    gate, up, down = (f"{theirs}.{part}.weight" for part in PROJECTIONS)
    return {f"{ours}.w_in.weight": [gate, up], f"{ours}.w_out.weight": [down]}


def latent_names(ours: str, norm: str, attention: str, settings: Mapping[str, Any]) -> Names:
    """Return the names of a sub-layer of latent attention.

    ours: our name of the sub-layer. norm, attention: their names of its modules.
    """
    parts = dict(LATENT)
    if not settings["model.latent.gated"]:
        del parts["gate"]
    if settings["model.latent.q_rank"] is None:
        del parts["q_down"], parts["q_norm"]
        parts["q_up"] = "q_proj"
    names = {f"{ours}.norm.weight": [f"{norm}.weight"]}
    for our, their in parts.items():
        names[f"{ours}.f.{our}.weight"] = [f"{attention}.{their}.weight"]
    return names


def is_unread(family: str, config: Mapping[str, Any], name: str) -> bool:
    """Return whether no weight is made of a tensor of a folder. name: in the network.

    Such tensors are masks and angles in old files, the tied output matrix, modules that predict
    further tokens, and matrices of LongCat's zero experts.
    """
    if name == "lm_head.weight":
        return bool(config.get("tie_word_embeddings", family == "gpt2"))
    if name.endswith(("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")):
        return True
    if family == "longcat_flash":
        expert = re.fullmatch(r"layers\.\d+\.mlp\.experts\.(\d+)\..+", name)
        is_zero_expert = expert is not None and int(expert[1]) >= config["n_routed_experts"]
        return name.startswith("mtp.") or is_zero_expert
    if family in ("deepseek_v3", "instella_moe"):
        layer = re.match(r"layers\.(\d+)\.", name)
        return layer is not None and int(layer[1]) >= config["num_hidden_layers"]
    return False


def zero_expert_names(ours: str, their_names: list[str], settings: Mapping[str, Any]) -> list[str]:
    """Return names of further matrices that transformers' LongCat-Flash requires beside those of
    our parameter: gate and up projections of zero experts. Their content has no effect."""
    if not ours.endswith("w_in_eDF") or not settings.get("moe.zero_experts"):
        return []
    first = settings["moe.num_experts"]
    end = first + settings["moe.zero_experts"]
    templates = [name.replace(".experts.0.", ".experts.{}.") for name in their_names[:2]]
    return [template.format(e) for e in range(first, end) for template in templates]


def in_our_layout(family: str, ours: str, weight: Tensor, experts: int) -> Tensor:
    """Return their weight, with its parts concatenated, in the layout of our parameter `ours`.

    experts: how many the weight has.
    """
    if ours.endswith(("w_in_eDF", "w_out_eFD")):  # theirs: one expert's [out, in] below the other
        return weight.unflatten(0, (experts, -1)).transpose(1, 2)
    return weight.T if is_turned(family, ours, weight) else weight


def in_their_layout(
    family: str, ours: str, weight: Tensor, names: list[str], settings: Mapping[str, Any]
) -> list[Tensor]:
    """Return our parameter as the parts that they keep under these names. Parts share no memory."""
    if ours.endswith(("w_in_eDF", "w_out_eFD")):
        weight = weight.transpose(1, 2).flatten(0, 1)
    elif is_turned(family, ours, weight):
        weight = weight.T
    sizes = [len(weight) // len(names)] * len(names)
    if ours.endswith("qkv.weight") and len(names) == 3:  # grouped queries: Q, K, V
        width = settings["model.head_dim"]
        keys = width * settings["model.kv_heads"]
        sizes = [width * settings["model.heads"], keys, keys]
    return [part.clone(memory_format=torch.contiguous_format) for part in weight.split(sizes)]


def is_turned(family: str, ours: str, weight: Tensor) -> bool:
    """Return whether their matrix is the transpose of ours: GPT-2 keeps matrices as [in, out]."""
    return family == "gpt2" and ".f." in ours and weight.dim() == 2
