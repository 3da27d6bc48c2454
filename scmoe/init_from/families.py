"""The models of transformers that have an equivalent here: GPT-2, LLaMA, Mixtral, Qwen2-MoE,
DeepSeek-V3 and LongCat-Flash. Also AMD's Instella-MoE, which has the names of DeepSeek-V3 and
another wiring.

KEYS and ALWAYS relate a config.json to our configuration, for reading (READERS) and for writing
(runs/hf_folder.py). For a config.json, a reader returns our settings, settings that our models do
not support, and the names of its weights.
"""

from collections.abc import Mapping
from typing import Any

from scmoe.blocks.sublayers import MOST_TURNS, YARN_POSITIONS
from scmoe.init_from.names import (
    GPT2,
    LLAMA,
    PROJECTIONS,
    Names,
    expert_names,
    latent_names,
    mlp_names,
    moe_names,
    outer_names,
    sublayer_names,
)

Reading = tuple[dict[str, Any], list[str], Names]  # settings, problems, names

LLAMA_KEYS = {  # our key: theirs
    "model.layers": "num_hidden_layers",
    "model.dim": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.ffn_dim": "intermediate_size",
    "model.norm_eps": "rms_norm_eps",
    "model.rope_theta": "rope_theta",
    "data.vocab_size": "vocab_size",
}
LATENT_KEYS = {
    **{
        key: LLAMA_KEYS[key] for key in LLAMA_KEYS if key not in ("model.kv_heads", "model.ffn_dim")
    },
    "model.latent.q_rank": "q_lora_rank",
    "model.latent.kv_rank": "kv_lora_rank",
    "model.latent.nope_dim": "qk_nope_head_dim",
    "model.latent.rope_dim": "qk_rope_head_dim",
    "model.latent.value_dim": "v_head_dim",
    "moe.num_experts": "n_routed_experts",
    "moe.router_scale": "routed_scaling_factor",
}
DEEPSEEK_KEYS = {
    **LATENT_KEYS,
    "moe.top_k": "num_experts_per_tok",
    "moe.ffn_dim": "moe_intermediate_size",
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
    "mixtral": {
        **LLAMA_KEYS,
        "moe.num_experts": "num_local_experts",
        "moe.top_k": "num_experts_per_tok",
    },
    "qwen2_moe": {
        **LLAMA_KEYS,
        "moe.num_experts": "num_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.renormalise": "norm_topk_prob",
        "moe.every": "decoder_sparse_step",
    },
    "deepseek_v3": DEEPSEEK_KEYS,
    "instella_moe": DEEPSEEK_KEYS,
    "longcat_flash": {
        **LATENT_KEYS,
        "model.ffn_dim": "ffn_hidden_size",
        "moe.top_k": "moe_topk",
        "moe.zero_experts": "zero_expert_num",
        "moe.ffn_dim": "expert_ffn_hidden_size",
    },
}
DEEPSEEK = {
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
}
ALWAYS: dict[str, dict[str, Any]] = {  # values that our models have
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"mlp_only_layers": [], "qkv_bias": False, "use_sliding_window": False},
    "deepseek_v3": {**DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "instella_moe": {**DEEPSEEK, "farskip": True, "gated_attention": True, "farskip_start_idx": 0},
    "longcat_flash": {
        "router_bias": False,
        "zero_expert_type": "identity",
        "attention_method": "MLA",
    },
}
PLAIN_ROUTER = {"moe.router": "softmax", "moe.router_scale": 1.0, "moe.noisy": False}
ALWAYS["instella_moe"] |= {"attn_only_farskip": False, "mlp_only_farskip": False}
ALWAYS["longcat_flash"] |= {
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "norm_topk_prob": False,
}
DEFAULTS = {  # of transformers, where a config.json leaves them out
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "longcat_flash": {"rms_norm_eps": 1e-5, "rope_theta": 1e7},
}
YARN = {  # beside the factor
    **{"original_max_position_embeddings": YARN_POSITIONS, "beta_fast": MOST_TURNS, "beta_slow": 1},
    **{"mscale": 1.0, "mscale_all_dim": 1.0},
}
INSTELLA, LONGCAT = "InstellaMoEForCausalLM", "LongcatFlashForCausalLM"


def family_of(config: Mapping[str, Any]) -> Any:
    """Return the name of the reader of a config.json. It is the model_type, but Instella-MoE
    declares that of DeepSeek-V3, and some folders of LongCat-Flash declare none: there the class
    decides. KeyError: none is declared.
    """
    classes = config.get("architectures") or ()
    if INSTELLA in classes:
        return "instella_moe"
    return config.get("model_type", "longcat_flash") if LONGCAT in classes else config["model_type"]


def read_gpt2(config: dict[str, Any]) -> Reading:
    gelu = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    given = {**config, "n_inner": config.get("n_inner") or 4 * config["n_embd"]}
    allowed = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    problems = others(config, allowed | {"add_cross_attention": False, "tie_word_embeddings": True})
    if (activation := config.get("activation_function", "gelu_new")) not in gelu:
        problems.append(f"activation_function is {activation!r}, allowed: {', '.join(gelu)}")
    settings = {ours: given[theirs] for ours, theirs in KEYS["gpt2"].items()} | {
        "model.family": "gpt",
        "model.kv_heads": config["n_head"],
        "model.activation": gelu.get(activation, activation),
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
    """Mixtral: standard top-k in every block. One expert would have the weight 1 there, and its
    probability here."""
    settings, problems = llama_settings("mixtral", config)
    if settings["moe.top_k"] < 2:
        problems.append(f"num_experts_per_tok is {settings['moe.top_k']}, allowed: 2 or more")
    settings |= {
        "moe.architecture": "top_k",
        "moe.renormalise": True,
        "moe.every": 1,
        **PLAIN_ROUTER,
    }
    settings["moe.ffn_dim"] = settings["model.ffn_dim"]
    return (
        settings,
        problems,
        outer_names(config) | moe_names(settings, "block_sparse_moe", ("w1", "w3", "w2")),
    )


def read_qwen2_moe(config: dict[str, Any]) -> Reading:
    """Qwen2-MoE: a shared expert with a sigmoid gate, which is CG-1 of the shared-expert
    architecture."""
    config, width = (
        {"decoder_sparse_step": 1, "norm_topk_prob": False, **config},
        config["intermediate_size"],
    )
    settings, problems = llama_settings("qwen2_moe", config)
    problems += others(
        config, {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    )
    one = settings["moe.top_k"] == 1
    if settings["moe.every"] not in (1, 2) or (one and settings["moe.renormalise"]):
        problems.append(
            "decoder_sparse_step allowed: 1 or 2; norm_topk_prob allowed for one expert per token:"
            " false"
        )
    settings |= {
        "moe.architecture": "shared_expert",
        "moe.renormalise": one or settings["moe.renormalise"],
    }
    settings |= {
        "moe.combine": "cg1",
        "moe.coefficient_input": "current",
        "moe.ffn_dim": width,
        **PLAIN_ROUTER,
    }
    return settings, problems, outer_names(config) | moe_names(settings, "mlp", PROJECTIONS)


def read_deepseek_v3(config: dict[str, Any]) -> Reading:
    """DeepSeek-V3 with one group of experts: the shared-expert architecture with Direct Add and
    latent attention."""
    settings, problems, names = deepseek("deepseek_v3", config)
    classes = config.get("architectures") or ["DeepseekV3ForCausalLM"]
    if classes != ["DeepseekV3ForCausalLM"]:
        problems.append(f"architectures is {classes}, allowed: DeepseekV3ForCausalLM or {INSTELLA}")
    return (
        settings | {"moe.architecture": "shared_expert", "moe.combine": "direct_add"},
        problems,
        names,
    )


def read_instella_moe(config: dict[str, Any]) -> Reading:
    """Instella-MoE: FarSkip in all blocks, and a gate on attention's result."""
    settings, problems, names = deepseek("instella_moe", config)
    if (end := config.get("farskip_end_idx", settings["model.layers"])) < settings["model.layers"]:
        problems.append(f"farskip_end_idx is {end}, allowed: num_hidden_layers or more")
    return settings | {"moe.architecture": "farskip"}, problems, names


def deepseek(family: str, config: dict[str, Any]) -> Reading:
    """What DeepSeek-V3 and Instella-MoE share. Modules that predict further tokens (MTP) are not
    read."""
    settings, problems = latent_settings(family, config)
    experts, shared, dense = (
        settings["moe.num_experts"],
        config["n_shared_experts"],
        config["first_k_dense_replace"],
    )
    if not shared or settings["moe.top_k"] < 2:
        one = "n_shared_experts allowed: 1 or more; num_experts_per_tok allowed: 2 or more"
        problems.append(
            f"n_shared_experts is {shared}, num_experts_per_tok is {settings['moe.top_k']}, {one}"
        )
    settings |= {
        "model.ffn_dim": (shared or 0) * settings["moe.ffn_dim"],
        "model.latent.gated": family == "instella_moe",
        "moe.leading_dense": [config["intermediate_size"]] * dense,
        "moe.router": "deepseek",
        "moe.every": 1,
    }
    names = outer_names(config)
    for block in range(settings["model.layers"]):
        own, layer = f"blocks.{block}", f"layers.{block}"
        names |= latent_names(
            f"{own}.sublayers.0", f"{layer}.input_layernorm", f"{layer}.self_attn", settings
        )
        if block < dense:
            names |= sublayer_names(block, 1, layer, LLAMA)
            continue
        names[f"{own}.norm.weight"] = [f"{layer}.post_attention_layernorm.weight"]
        names |= mlp_names(f"{own}.shared_expert", f"{layer}.mlp.shared_experts")
        names[f"{own}.moe.router.gate.weight"] = [f"{layer}.mlp.gate.weight"]
        names[f"{own}.moe.router.bias.weight"] = [f"{layer}.mlp.gate.e_score_correction_bias"]
        names |= expert_names(own, f"{layer}.mlp", experts)
    return settings, problems, names


def read_longcat_flash(config: dict[str, Any]) -> Reading:
    """LongCat-Flash: a layer is a pair with a shortcut from Pos-2, whose tap has the norm of the
    MLP after it. Modules that predict further tokens (MTP) are not read, and neither are matrices
    of zero experts, which nothing uses.
    """
    zero_experts, pairs = config.get("zero_expert_num") or 0, config["num_layers"]
    given = {**config, "num_hidden_layers": 2 * pairs, "zero_expert_num": zero_experts}
    settings, problems = latent_settings("longcat_flash", given)
    if pairs < 1 or settings["model.latent.q_rank"] is None:
        problems.append(
            f"num_layers is {pairs}, q_lora_rank is {config['q_lora_rank']}, allowed: 1 or more"
            " each"
        )
    settings |= {
        **{
            "model.latent.scaled": True,
            "moe.architecture": "scmoe",
            "moe.every": 2,
            "moe.position": "pos2",
        },
        **{"moe.first_position": "pos2", "moe.tap_norm": "shared", "moe.combine": "direct_add"},
        **{"moe.coefficient_input": "current", "moe.router": "longcat", "moe.leading_dense": []},
    }
    names = outer_names(config)
    for pair in range(pairs):
        own, layer = f"blocks.{pair}", f"layers.{pair}"
        for i in (0, 1):
            norm, attention = f"{layer}.input_layernorm.{i}", f"{layer}.self_attn.{i}"
            names |= latent_names(f"{own}.sublayers.{2 * i}", norm, attention, settings)
        names[f"{own}.sublayers.1.norm.weight"] = [f"{layer}.post_attention_layernorm.0.weight"]
        names |= mlp_names(f"{own}.sublayers.1.f", f"{layer}.mlps.0")
        names[f"{own}.norm.weight"] = [f"{layer}.post_attention_layernorm.1.weight"]
        names |= mlp_names(f"{own}.shared_expert", f"{layer}.mlps.1")
        names[f"{own}.moe.router.gate.weight"] = [f"{layer}.mlp.router.classifier.weight"]
        names[f"{own}.moe.router.bias.weight"] = [f"{layer}.mlp.router.e_score_correction_bias"]
        names |= expert_names(own, f"{layer}.mlp", settings["moe.num_experts"])
    return settings, problems, names


def llama_settings(family: str, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of LLaMA or a relative, and problems."""
    heads, dim, flat = (
        config["num_attention_heads"],
        config["hidden_size"],
        flattened(family, config),
    )
    flat["head_dim"] = config.get("head_dim") or dim // heads
    allowed = {"rope_type": "default", "hidden_act": "silu", "head_dim": dim // heads}
    problems = others(flat, {**allowed, **ALWAYS["llama"], **ALWAYS[family]})
    settings = {ours: flat[theirs] for ours, theirs in KEYS[family].items()}
    return (
        settings
        | {"model.family": "llama", "model.activation": "swiglu", "model.attention": "full"},
        problems,
    )


def latent_settings(family: str, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a model with latent attention, and problems. Its only type of rotary
    positions beside the default one is YaRN, with the numbers of DeepSeek-V3."""
    flat, rope_dim, heads = (
        flattened(family, config),
        config["qk_rope_head_dim"],
        config["num_attention_heads"],
    )
    allowed = {
        "hidden_act": "silu",
        "head_dim": rope_dim,
        "num_key_value_heads": heads,
        "attention_bias": False,
    }
    allowed["qk_head_dim"] = config["qk_nope_head_dim"] + rope_dim
    yarn = flat["rope_type"] == "yarn"
    if yarn:
        allowed |= {**YARN, "attention_factor": None}
        flat = {"original_max_position_embeddings": config.get("max_position_embeddings"), **flat}
        flat = {"mscale": None, "mscale_all_dim": None, **flat}
    else:
        allowed["rope_type"] = "default"
    problems = others(flat, {**allowed, **ALWAYS[family]})
    settings = {ours: flat[theirs] for ours, theirs in KEYS[family].items()}
    settings |= {"model.family": "llama", "model.activation": "swiglu", "model.attention": "latent"}
    settings |= {
        "model.latent.scaled": False,
        "model.latent.gated": False,
        "moe.after_norm": False,
        "moe.noisy": False,
    }
    return settings | {"model.latent.yarn_factor": flat["factor"] if yarn else 1.0}, problems


def flattened(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the values of rotary positions beside the others, and with
    transformers' defaults."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0} | DEFAULTS.get(family, {})
    kept = {key: value for key, value in config.items() if value is not None or key not in defaults}
    flat = {
        **defaults,
        **kept,
        **rope,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    return flat | {
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"]
    }


def others(config: Mapping[str, Any], allowed: Mapping[str, Any]) -> list[str]:
    """Return a message for each setting that our models do not support."""
    different = {key: value for key, value in allowed.items() if config.get(key, value) != value}
    return [f"{key} is {config[key]!r}, allowed: {value!r}" for key, value in different.items()]


READERS = {
    "gpt2": read_gpt2,
    "llama": read_llama,
    "mixtral": read_mixtral,
    "qwen2_moe": read_qwen2_moe,
    "deepseek_v3": read_deepseek_v3,
    "instella_moe": read_instella_moe,
    "longcat_flash": read_longcat_flash,
}
