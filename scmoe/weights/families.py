"""The models of transformers that have an equivalent here.

They are GPT-2, LLaMA, Mixtral, Qwen2-MoE, DeepSeek-V3 and LongCat-Flash, and AMD's Instella-MoE,
which has the names of DeepSeek-V3 and another wiring.

family_keys.py relates a config.json to our configuration, for reading (READERS) and for writing
(weights/hf_config.py). For a config.json, a reader returns our settings, settings that our models
do not support, and the names of its weights.
"""

from collections.abc import Mapping
from typing import Any

from scmoe.weights.family_keys import ALWAYS, FAMILY_DEFAULTS, FAMILY_KEYS, YARN
from scmoe.weights.names import (
    GPT2_LAYERS,
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
PLAIN_ROUTER = {"moe.router": "softmax", "moe.router_scale": 1.0, "moe.noisy": False}
INSTELLA_CLASS = "InstellaMoEForCausalLM"
LONGCAT_CLASS = "LongcatFlashForCausalLM"


def reader_name(config: Mapping[str, Any]) -> Any:
    """Return the name of the reader of a config.json.

    It is the model_type, with two exceptions where the class decides: Instella-MoE declares the
    type of DeepSeek-V3, and some folders of LongCat-Flash declare none. Raises KeyError if none is
    declared.
    """
    classes = config.get("architectures") or ()
    if INSTELLA_CLASS in classes:
        return "instella_moe"
    if LONGCAT_CLASS in classes:
        return config.get("model_type", "longcat_flash")
    return config["model_type"]


def read_gpt2(config: dict[str, Any]) -> Reading:
    allowed = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    problems = others(config, allowed)
    gelu = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    activation = config.get("activation_function", "gelu_new")
    if activation not in gelu:
        problems.append(f"activation_function is {activation!r}, allowed: {', '.join(gelu)}")

    complete = {**config, "n_inner": config.get("n_inner") or 4 * config["n_embd"]}
    settings = {ours: complete[theirs] for ours, theirs in FAMILY_KEYS["gpt2"].items()}
    settings["model.family"] = "gpt"
    settings["model.kv_heads"] = config["n_head"]
    settings["model.head_dim"] = config["n_embd"] // config["n_head"]
    settings["model.activation"] = gelu.get(activation, activation)

    names = {"tokens.weight": ["wte.weight"], "positions.weight": ["wpe.weight"]}
    for part in ("weight", "bias"):
        names[f"norm.{part}"] = [f"ln_f.{part}"]
        for block in range(config["n_layer"]):
            for i in (0, 1):
                names |= sublayer_names(block, i, f"h.{block}", GPT2_LAYERS, part)
    return settings, problems, names


def read_llama(config: dict[str, Any]) -> Reading:
    settings, problems = llama_settings("llama", config)
    names = outer_names(config)
    for block in range(settings["model.layers"]):
        for i in (0, 1):
            names |= sublayer_names(block, i, f"layers.{block}", LLAMA)
    return settings, problems, names


def read_mixtral(config: dict[str, Any]) -> Reading:
    """Read Mixtral: standard top-k in every block.

    With top_k of 1 the expert's weight would be 1 there, and its probability here.
    """
    settings, problems = llama_settings("mixtral", config)
    if settings["moe.top_k"] < 2:
        problems.append(f"num_experts_per_tok is {settings['moe.top_k']}, allowed: 2 or more")
    settings |= {
        "moe.architecture": "top_k",
        "moe.renormalise": True,
        "moe.every": 1,
        **PLAIN_ROUTER,
        "moe.ffn_dim": settings["model.ffn_dim"],
    }
    names = outer_names(config) | moe_names(settings, "block_sparse_moe", ("w1", "w3", "w2"))
    return settings, problems, names


def read_qwen2_moe(config: dict[str, Any]) -> Reading:
    """Read Qwen2-MoE: a shared expert with a sigmoid gate, which is CG-1 of the shared-expert
    architecture."""
    config = {"decoder_sparse_step": 1, "norm_topk_prob": False, **config}
    width = config["intermediate_size"]
    settings, problems = llama_settings("qwen2_moe", config)
    widths = {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    problems += others(config, widths)
    is_top1 = settings["moe.top_k"] == 1
    if settings["moe.every"] not in (1, 2, 4) or (is_top1 and settings["moe.renormalise"]):
        problems.append(
            "decoder_sparse_step allowed: 1, 2 or 4; norm_topk_prob allowed for one expert per"
            " token: false"
        )
    settings |= {
        "moe.architecture": "shared_expert",
        "moe.renormalise": is_top1 or settings["moe.renormalise"],
        "moe.combine": "cg1",
        "moe.coefficient_input": "current",
        "moe.ffn_dim": width,
        **PLAIN_ROUTER,
    }
    names = outer_names(config) | moe_names(settings, "mlp", PROJECTIONS)
    return settings, problems, names


def read_deepseek_v3(config: dict[str, Any]) -> Reading:
    """Read DeepSeek-V3 with one group of experts: the shared-expert architecture with Direct Add
    and latent attention."""
    settings, problems, names = deepseek("deepseek_v3", config)
    classes = config.get("architectures") or ["DeepseekV3ForCausalLM"]
    if classes != ["DeepseekV3ForCausalLM"]:
        problems.append(
            f"architectures is {classes}, allowed: DeepseekV3ForCausalLM or {INSTELLA_CLASS}"
        )
    settings["moe.architecture"] = "shared_expert"
    settings["moe.combine"] = "direct_add"
    return settings, problems, names


def read_instella_moe(config: dict[str, Any]) -> Reading:
    """Read Instella-MoE: FarSkip in all blocks, and a gate on attention's result."""
    settings, problems, names = deepseek("instella_moe", config)
    layers = settings["model.layers"]
    end = config.get("farskip_end_idx", layers)
    if end < layers:
        problems.append(f"farskip_end_idx is {end}, allowed: num_hidden_layers or more")
    settings["moe.architecture"] = "farskip"
    return settings, problems, names


def deepseek(family: str, config: dict[str, Any]) -> Reading:
    """Read what DeepSeek-V3 and Instella-MoE share. Modules that predict further tokens (MTP) are
    not read."""
    settings, problems = latent_settings(family, config)
    experts = settings["moe.num_experts"]
    top_k = settings["moe.top_k"]
    shared = config["n_shared_experts"]
    dense = config["first_k_dense_replace"]
    if not shared or top_k < 2:
        problems.append(
            f"n_shared_experts is {shared}, num_experts_per_tok is {top_k}, n_shared_experts"
            " allowed: 1 or more; num_experts_per_tok allowed: 2 or more"
        )
    settings |= {
        "model.ffn_dim": (shared or 0) * settings["moe.ffn_dim"],
        "model.latent.gated": family == "instella_moe",
        "moe.leading_dense": [config["intermediate_size"]] * dense,
        "moe.router": "deepseek",
        "moe.every": 1,
    }
    names = outer_names(config)
    for number in range(settings["model.layers"]):
        block = f"blocks.{number}"
        layer = f"layers.{number}"
        names |= latent_names(
            f"{block}.sublayers.0", f"{layer}.input_layernorm", f"{layer}.self_attn", settings
        )
        if number < dense:
            names |= sublayer_names(number, 1, layer, LLAMA)
            continue
        names[f"{block}.norm.weight"] = [f"{layer}.post_attention_layernorm.weight"]
        names |= mlp_names(f"{block}.shared_expert", f"{layer}.mlp.shared_experts")
        names[f"{block}.moe.router.gate.weight"] = [f"{layer}.mlp.gate.weight"]
        names[f"{block}.moe.router.bias.weight"] = [f"{layer}.mlp.gate.e_score_correction_bias"]
        names |= expert_names(block, f"{layer}.mlp", experts)
    return settings, problems, names


def read_longcat_flash(config: dict[str, Any]) -> Reading:
    """Read LongCat-Flash: a layer is a pair with a shortcut from Pos-2, whose tap has the norm of
    the MLP after it.

    Modules that predict further tokens (MTP) are not read, and neither are matrices of zero
    experts, which nothing uses.
    """
    pairs = config["num_layers"]
    zero_experts = config.get("zero_expert_num") or 0
    complete = {**config, "num_hidden_layers": 2 * pairs, "zero_expert_num": zero_experts}
    settings, problems = latent_settings("longcat_flash", complete)
    if pairs < 1 or settings["model.latent.q_rank"] is None:
        problems.append(
            f"num_layers is {pairs}, q_lora_rank is {config['q_lora_rank']}, allowed: 1 or more"
            " each"
        )
    settings |= {
        "model.latent.scaled": True,
        "moe.architecture": "scmoe",
        "moe.every": 2,
        "moe.position": "pos2",
        "moe.first_position": "pos2",
        "moe.tap_norm": "shared",
        "moe.combine": "direct_add",
        "moe.coefficient_input": "current",
        "moe.router": "longcat",
        "moe.leading_dense": [],
    }
    names = outer_names(config)
    for pair in range(pairs):
        block = f"blocks.{pair}"
        layer = f"layers.{pair}"
        for i in (0, 1):
            norm = f"{layer}.input_layernorm.{i}"
            attention = f"{layer}.self_attn.{i}"
            names |= latent_names(f"{block}.sublayers.{2 * i}", norm, attention, settings)
        names[f"{block}.sublayers.1.norm.weight"] = [f"{layer}.post_attention_layernorm.0.weight"]
        names |= mlp_names(f"{block}.sublayers.1.f", f"{layer}.mlps.0")
        names[f"{block}.norm.weight"] = [f"{layer}.post_attention_layernorm.1.weight"]
        names |= mlp_names(f"{block}.shared_expert", f"{layer}.mlps.1")
        names[f"{block}.moe.router.gate.weight"] = [f"{layer}.mlp.router.classifier.weight"]
        names[f"{block}.moe.router.bias.weight"] = [f"{layer}.mlp.router.e_score_correction_bias"]
        names |= expert_names(block, f"{layer}.mlp", settings["moe.num_experts"])
    return settings, problems, names


def llama_settings(family: str, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of LLaMA or a relative, and problems."""
    flat = flattened(family, config)
    flat["head_dim"] = (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    allowed = {"rope_type": "default", "hidden_act": "silu"}
    problems = others(flat, {**allowed, **ALWAYS["llama"], **ALWAYS[family]})
    settings = {ours: flat[theirs] for ours, theirs in FAMILY_KEYS[family].items()}
    settings["model.family"] = "llama"
    settings["model.activation"] = "swiglu"
    settings["model.attention"] = "full"
    return settings, problems


def latent_settings(family: str, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a model with latent attention, and problems.

    Rotary positions are the default ones, or YaRN with the numbers of DeepSeek-V3.
    """
    flat = flattened(family, config)
    rope_dim = config["qk_rope_head_dim"]
    allowed = {
        "hidden_act": "silu",
        "head_dim": rope_dim,
        "num_key_value_heads": config["num_attention_heads"],
        "attention_bias": False,
        "qk_head_dim": config["qk_nope_head_dim"] + rope_dim,
    }
    is_yarn = flat["rope_type"] == "yarn"
    if is_yarn:
        allowed |= {**YARN, "attention_factor": None, "truncate": True}
        flat = {"original_max_position_embeddings": config.get("max_position_embeddings"), **flat}
        flat = {"mscale": None, "mscale_all_dim": None, **flat}
    else:
        allowed["rope_type"] = "default"
    problems = others(flat, {**allowed, **ALWAYS[family]})
    settings = {ours: flat[theirs] for ours, theirs in FAMILY_KEYS[family].items()}
    settings |= {
        "model.family": "llama",
        "model.activation": "swiglu",
        "model.attention": "latent",
        "model.latent.scaled": False,
        "model.latent.gated": False,
        "moe.after_norm": False,
        "moe.noisy": False,
        "model.latent.yarn_factor": flat["factor"] if is_yarn else 1.0,
    }
    return settings, problems


def flattened(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with transformers' defaults and without a section for rotary positions:
    its values are beside the others."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0} | FAMILY_DEFAULTS.get(family, {})
    kept = {key: value for key, value in config.items() if value is not None or key not in defaults}
    return {
        **defaults,
        **kept,
        **rope,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
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
