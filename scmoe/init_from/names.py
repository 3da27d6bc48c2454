"""The names and the layout of weights: ours, and those of the files of transformers' models.

A parameter of ours is made of one or more tensors of theirs, which are concatenated along the first
dim.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Names = dict[str, list[str]]  # our name: their names

# The parts of attention and MLP: our names, GPT-2's and LLaMA's.
OURS = (("norm", "f.qkv", "f.out"), ("norm", "f.w_in", "f.w_out"))
GPT2 = (("ln_1", "attn.c_attn", "attn.c_proj"), ("ln_2", "mlp.c_fc", "mlp.c_proj"))
LLAMA = (
    ("input_layernorm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"),
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LATENT = {  # our names of latent attention's weights, and theirs
    **{"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"},
    **{"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"},
    **{"gate": "gate_proj", "out": "o_proj"},
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
    """Return the names of sublayer i of a block: attention where i is even, an MLP where it is odd.
    part: or bias."""
    return {
        f"blocks.{block}.sublayers.{i}.{our}.{part}": [
            f"{layer}.{name}.{part}" for name in their.split()
        ]
        for our, their in zip(OURS[i % 2], theirs[i % 2], strict=True)
    }


def moe_names(settings: Mapping[str, Any], moe: str, matrices: tuple[str, str, str]) -> Names:
    """Return the names of all blocks with an MoE: of pairs of a dense and an MoE layer where
    moe.every is 2.

    moe: their name of the MoE module. matrices: their names of an expert's gate, up and down
    projections.
    """
    names: Names = {}
    every = settings["moe.every"]
    for block in range(settings["model.layers"] // every):
        for i in range(2 * every - 1):
            names |= sublayer_names(block, i, f"layers.{every * block + i // 2}", LLAMA)
        own, last = f"blocks.{block}", f"layers.{every * block + every - 1}"
        names[f"{own}.norm.weight"] = [f"{last}.post_attention_layernorm.weight"]
        names[f"{own}.moe.router.gate.weight"] = [f"{last}.{moe}.gate.weight"]
        names |= expert_names(own, f"{last}.{moe}", settings["moe.num_experts"], matrices)
        if settings["moe.architecture"] == "shared_expert":
            names |= mlp_names(f"{own}.shared_expert", f"{last}.{moe}.shared_expert")
            names[f"{own}.coefficient.gate.weight"] = [f"{last}.{moe}.shared_expert_gate.weight"]
    return names


def expert_names(
    own: str, moe: str, experts: int, matrices: tuple[str, ...] = PROJECTIONS
) -> Names:
    """Return the names of the routed experts of one block, ours and theirs."""
    gate, up, down = matrices
    each = [f"{moe}.experts.{e}" for e in range(experts)]
    return {
        f"{own}.moe.experts.w_in_eDF": [
            f"{expert}.{part}.weight" for expert in each for part in (gate, up)
        ],
        f"{own}.moe.experts.w_out_eFD": [f"{expert}.{down}.weight" for expert in each],
    }


def mlp_names(own: str, theirs: str) -> Names:
    gate, up, down = (f"{theirs}.{part}.weight" for part in PROJECTIONS)
    return {f"{own}.w_in.weight": [gate, up], f"{own}.w_out.weight": [down]}


def latent_names(own: str, norm: str, attention: str, settings: Mapping[str, Any]) -> Names:
    """Return the names of a sub-layer of latent attention, ours (own) and theirs: of the norm and
    of the attention."""
    parts = {
        our: their
        for our, their in LATENT.items()
        if our != "gate" or settings["model.latent.gated"]
    }
    if settings["model.latent.q_rank"] is None:
        parts = {our: their for our, their in parts.items() if our not in ("q_down", "q_norm")} | {
            "q_up": "q_proj"
        }
    names = {
        f"{own}.f.{our}.weight": [f"{attention}.{their}.weight"] for our, their in parts.items()
    }
    return {f"{own}.norm.weight": [f"{norm}.weight"]} | names


def is_unread(family: str, config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of a folder, by its name in the network, is one that no weight is made of:
    masks and angles in old files, the tied output matrix, modules that predict further tokens, and
    matrices of LongCat's zero experts.
    """
    if name == "lm_head.weight":
        return bool(config.get("tie_word_embeddings", family == "gpt2"))
    if name.endswith(("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")):
        return True
    if family == "longcat_flash":
        expert = re.fullmatch(r"layers\.\d+\.mlp\.experts\.(\d+)\..+", name)
        return name.startswith("mtp.") or (
            expert is not None and int(expert[1]) >= config["n_routed_experts"]
        )
    layer = (
        re.match(r"layers\.(\d+)\.", name) if family in ("deepseek_v3", "instella_moe") else None
    )
    return layer is not None and int(layer[1]) >= config["num_hidden_layers"]


def zero_expert_names(ours: str, their_names: list[str], settings: Mapping[str, Any]) -> list[str]:
    """Return names of further matrices, of any content, that transformers' LongCat-Flash requires
    beside those that our parameter gives: gate and up projections of zero experts."""
    if not ours.endswith("w_in_eDF") or not settings.get("moe.zero_experts"):
        return []
    first, zero_experts = settings["moe.num_experts"], settings["moe.zero_experts"]
    of_one = [name.replace(".experts.0.", ".experts.{}.") for name in their_names[:2]]
    return [name.format(e) for e in range(first, first + zero_experts) for name in of_one]


def in_our_layout(family: str, ours: str, weight: Tensor, experts: int) -> Tensor:
    """Return a weight of theirs, its parts concatenated, as our parameter `ours` has it. experts:
    how many it has."""
    if ours.endswith(("w_in_eDF", "w_out_eFD")):  # theirs: one expert's [out, in] below the other
        return weight.unflatten(0, (experts, -1)).transpose(1, 2)
    return weight.T if is_turned(family, ours, weight) else weight


def in_their_layout(
    family: str, ours: str, weight: Tensor, names: list[str], settings: Mapping[str, Any]
) -> list[Tensor]:
    """Return our parameter as the parts that they keep under these names, each with memory of its
    own."""
    if ours.endswith(("w_in_eDF", "w_out_eFD")):
        weight = weight.transpose(1, 2).flatten(0, 1)
    elif is_turned(family, ours, weight):
        weight = weight.T
    sizes = [len(weight) // len(names)] * len(names)
    if ours.endswith("qkv.weight") and len(names) == 3:  # grouped queries: Q, K, V
        keys = settings["model.dim"] // settings["model.heads"] * settings["model.kv_heads"]
        sizes = [settings["model.dim"], keys, keys]
    return [part.clone(memory_format=torch.contiguous_format) for part in weight.split(sizes)]


def is_turned(family: str, ours: str, weight: Tensor) -> bool:
    return (
        family == "gpt2" and ".f." in ours and weight.dim() == 2
    )  # GPT-2 keeps matrices as [in, out]
