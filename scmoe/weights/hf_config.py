"""Writes and reads the config.json of a folder in Hugging Face's form.

It is that of transformers' model if it has an equal one, else ours:

    dense GPT, dense LLaMA                                 gpt2, llama
    LLaMA, top-k in every block, top_k >= 2, renormalised  mixtral
    LLaMA, shared-expert, CG-1                             qwen2_moe
    LLaMA, shared-expert, latents, router deepseek         deepseek_v3
    LLaMA, ScMoE Pos-2, scaled latents, router longcat     longcat_flash
    ScMoE, DGMoE and everything else                       scmoe: the classes that `import scmoe.hf`
                                                           registers

A model is equal if its config.json, read back, gives our settings. transformers' models drop no
token, so a folder describes our model with the configuration `dropless` (decision 28).
"""

import json
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from scmoe.config.fields import Config
from scmoe.config.halved_batches import schedule_of_one_rank
from scmoe.config.load import load_text
from scmoe.config.registry import ARCHITECTURES, ROUTERS
from scmoe.weights.families import READERS, reader_name
from scmoe.weights.family_keys import ALWAYS, FAMILY_KEYS, YARN
from scmoe.weights.pretrained import model_settings, resolved_settings

OUR_MODEL_TYPE = "scmoe"
NATIVE = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
}
# the model_type that may be equal, by model.family, model.attention and moe.architecture
EQUAL_MODEL_TYPES = {
    ("gpt", "full", "dense"): "gpt2",
    ("llama", "full", "dense"): "llama",
    ("llama", "full", "top_k"): "mixtral",
    ("llama", "full", "shared_expert"): "qwen2_moe",
    ("llama", "latent", "shared_expert"): "deepseek_v3",
    ("llama", "latent", "scmoe"): "longcat_flash",
}


def dropless(config: Config) -> Config:
    """Return the configuration for one process that drops no copy of a token, so that a model's
    result does not depend on a batch."""
    moe = replace(
        config.moe, capacity_factor=None, dropless_ceiling=None, rows="auto", overflow="drop"
    )
    return replace(
        config,
        init_from=None,
        moe=moe,
        schedule=schedule_of_one_rank(config.schedule),
        strategy=type(config.strategy)(),
        trainer=type(config.trainer)(),
    )


def hf_config(config: Config, end_of_text: int | None) -> dict[str, Any]:
    """Return the content of config.json. end_of_text: an id, or None.

    Raises ValueError if the model is no language model, or a part of it is an extension's, whose
    options config.json does not keep.
    """
    if config.model.family not in ("gpt", "llama"):
        raise ValueError(
            f"model.family is {config.model.family}, allowed with --format hf: gpt | llama"
        )
    moe = config.moe
    for key, name, names in (
        ("architecture", moe.architecture, ARCHITECTURES),
        ("router", moe.router, ROUTERS),
    ):
        if name not in names.built_in:
            raise ValueError(
                f"--format hf cannot export the model: an extension defines moe.{key}={name}. Use"
                " --format safetensors."
            )
    content = native_config(config) or scmoe_config(config)
    return {**content, "bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32"}


def native_config(config: Config) -> dict[str, Any] | None:
    """Return the config.json of transformers' equal model; None if there is none."""
    moe = config.moe
    family = EQUAL_MODEL_TYPES.get((config.model.family, config.model.attention, moe.architecture))
    # An added bias and balanced routing are not among the settings of a model.
    has_added_bias = moe.router == "softmax" and moe.bias_rate is not None
    if family is None or moe.balanced_routing or has_added_bias:
        return None
    content = their_config(family, config)
    if READERS[family](content)[1]:
        return None
    read = our_config(content, "config.json")
    is_equal = model_settings(read) == model_settings(replace(config, extensions=[]))
    return content if is_equal else None


def their_config(family: str, config: Config) -> dict[str, Any]:
    """Return a config.json of this model_type with all settings that it has keys for."""
    settings = resolved_settings(config)
    model = config.model
    activation = settings["model.activation"]
    content: dict[str, Any] = {"model_type": family, "architectures": [NATIVE[family]]}
    content |= {theirs: settings[ours] for ours, theirs in FAMILY_KEYS[family].items()}
    if family == "gpt2":
        return content | {
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": 0.0,
            "n_positions": config.data.seq_len,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new" if activation == "gelu_tanh" else activation,
        }

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.latent.yarn_factor != 1:
        rope |= {"rope_type": "yarn", "factor": model.latent.yarn_factor, **YARN}
    content |= ALWAYS[family] | {
        "max_position_embeddings": config.data.seq_len,
        "rope_parameters": rope,
        "hidden_act": "silu" if activation == "swiglu" else activation,
        "tie_word_embeddings": False,
    }
    if family == "qwen2_moe":
        width = settings["moe.ffn_dim"]
        content["moe_intermediate_size"] = width
        content["shared_expert_intermediate_size"] = width
        content["norm_topk_prob"] = config.moe.renormalise and config.moe.top_k > 1
    if family == "deepseek_v3":
        dense = config.moe.leading_dense
        content["num_key_value_heads"] = model.heads
        content["first_k_dense_replace"] = len(dense)
        content["intermediate_size"] = dense[0] if dense else settings["model.ffn_dim"]
        content["n_shared_experts"] = settings["model.ffn_dim"] // settings["moe.ffn_dim"]
        content["num_nextn_predict_layers"] = 0
    if family == "longcat_flash":
        content["num_layers"] = model.layers // 2
        content["head_dim"] = model.latent.rope_dim
    return content


def scmoe_config(config: Config) -> dict[str, Any]:
    """Return the config.json of a model that transformers does not have: sections of our
    configuration."""
    kept = dropless(config)
    return {
        "model_type": OUR_MODEL_TYPE,
        "architectures": ["ScMoEForCausalLM"],
        "scmoe": {
            "model": asdict(kept.model),
            "moe": asdict(kept.moe),
            "schedule": asdict(kept.schedule),
            "data": {
                "name": "synthetic",
                "vocab_size": config.data.vocab_size,
                "seq_len": config.data.seq_len,
            },
        },
        **transformers_sizes(config),
    }


def transformers_sizes(config: Config) -> dict[str, Any]:
    """Return the settings of a model of type scmoe under transformers' names, for programs that
    read them.

    With latent attention a cache has one head, whose keys are the latents. num_experts: what a
    router chooses from, zero experts included; a dense model has no such setting.
    """
    settings = resolved_settings(config)
    model = config.model
    is_latent = model.attention == "latent"
    experts = {}
    if config.moe.architecture != "dense":
        experts["num_experts"] = config.moe.num_experts + config.moe.zero_experts
        experts["num_experts_per_tok"] = config.moe.top_k
    return {
        "vocab_size": config.data.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": settings["model.ffn_dim"],
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": 1 if is_latent else settings["model.kv_heads"],
        "head_dim": model.latent.kv_rank if is_latent else settings["model.head_dim"],
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": model.family == "gpt",
        **experts,
    }


@lru_cache(maxsize=16)
def _config_of(text: str, source: str) -> Config:
    """Read a configuration once: transformers asks a model for it several times."""
    return load_text(text, source)


def our_config(content: dict[str, Any], source: str) -> Config:
    """Return our configuration for a config.json.

    Raises ValueError if it has a setting that our models do not support.
    """
    if content.get("model_type") == OUR_MODEL_TYPE:
        return _config_of(json.dumps(content.get("scmoe")), source)
    try:
        settings, problems, _ = READERS[reader_name(content)](content)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{source} is not that of a {reader_name(content)}: {error!r}") from error
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")
    ours = {
        "moe.architecture": "dense",
        **settings,
        "data.seq_len": content.get("n_positions") or content.get("max_position_embeddings"),
        "data.name": "synthetic",
        "moe.capacity_factor": None,
    }
    return _config_of(json.dumps(ours), source)
