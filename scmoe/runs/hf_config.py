"""The config.json of an exported folder: that of transformers' own model where there is an equal one, else ours.

    dense GPT, dense LLaMA                                 gpt2, llama
    LLaMA, top-k in every block, top_k >= 2, renormalised  mixtral
    LLaMA, shared-expert, CG-1                             qwen2_moe
    ScMoE, DGMoE and everything else                       scmoe: the classes that `import scmoe.hf` registers

transformers' models drop no token. So `dropless` is what a folder's configuration means (decision 28).
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scmoe.config.fields import Config
from scmoe.config.load import load_text
from scmoe.config.registry import ARCHITECTURES
from scmoe.init_from.families import READERS
from scmoe.init_from.settings import settings
from scmoe.models.llama import NORM_EPS

OURS = "scmoe"
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def dropless(config: Config) -> Config:
    """Return the configuration for one process that keeps every token's copies: what a model means without a batch."""
    moe = replace(config.moe, capacity_factor=None, dropless_ceiling=None, rows="auto", overflow="drop")
    return replace(config, init_from=None, moe=moe, strategy=type(config.strategy)(), trainer=type(config.trainer)())


def hf_config(config: Config, end_of_text: int | None) -> dict[str, Any]:
    """Return the content of config.json. end_of_text: an id, or None. ValueError: it is no language model."""
    if config.model.family not in ("gpt", "llama"):
        raise ValueError(
            f"model.family is {config.model.family}, allowed with --format hf: gpt | llama, language models"
        )
    if config.moe.architecture not in ARCHITECTURES.built_in:
        allowed = "allowed with --format hf: an architecture of scmoe; --format safetensors takes any"
        raise ValueError(f"moe.architecture is {config.moe.architecture}, {allowed}")
    content = native_config(config) or own_config(config)
    ends = {} if end_of_text is None else {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return {**content, "bos_token_id": None, "eos_token_id": None, **ends, "dtype": "float32"}


def native_config(config: Config) -> dict[str, Any] | None:
    """Return the config.json of transformers' own equal model; None where it has none."""
    model, moe, given = config.model, config.moe, settings(config)
    heads, width, kv_heads = model.heads, given["model.ffn_dim"], given["model.kv_heads"]
    if model.family == "gpt":
        if moe.architecture != "dense" or kv_heads != heads or given["model.activation"] not in GPT2_ACTIVATIONS:
            return None
        sizes = {"n_layer": model.layers, "n_embd": model.dim, "n_head": heads, "n_inner": width}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop"), model.dropout) | {"attn_pdrop": 0.0}
        rest = {"n_positions": config.data.seq_len, "vocab_size": config.data.vocab_size, "layer_norm_epsilon": 1e-5}
        activation = {"activation_function": GPT2_ACTIVATIONS[given["model.activation"]]}
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes, **drops, **rest, **activation}
    unlike = moe.architecture != "dense" and (moe.noisy or moe.balanced_routing)
    if unlike or given["model.activation"] != "swiglu":
        return None
    common = {
        "hidden_size": model.dim,
        "intermediate_size": width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": config.data.vocab_size,
        "max_position_embeddings": config.data.seq_len,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if moe.architecture == "dense":
        bias = {"attention_bias": False, "mlp_bias": False}
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **common, **bias}
    if moe.architecture == "top_k" and moe.every == 1 and moe.top_k > 1 and moe.renormalise:
        mixtral: dict[str, Any] = {
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "sliding_window": None,
        }
        return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **common, **mixtral}
    if moe.architecture == "shared_expert" and moe.combine == "cg1":
        experts: dict[str, Any] = {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.renormalise and moe.top_k > 1,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width,
            "decoder_sparse_step": moe.every,
            "mlp_only_layers": [],
            "qkv_bias": False,
            "use_sliding_window": False,
        }
        return {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], **common, **experts}
    return None


def own_config(config: Config) -> dict[str, Any]:
    """Return the config.json of a model that only this project has: its sections of our configuration."""
    data = {"name": "synthetic", "vocab_size": config.data.vocab_size, "seq_len": config.data.seq_len}
    sections = {name: asdict(getattr(dropless(config), name)) for name in ("model", "moe", "schedule")}
    return {
        "model_type": OURS,
        "architectures": ["ScMoEForCausalLM"],
        "scmoe": {**sections, "data": data},
        "vocab_size": config.data.vocab_size,
        "hidden_size": config.model.dim,
        "num_hidden_layers": config.model.layers,
        "num_attention_heads": config.model.heads,
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": config.model.family == "gpt",
    }


def our_config(content: dict[str, Any], source: str) -> Config:
    """Return our configuration for a config.json. ValueError: it has a setting that our models do not support."""
    if content.get("model_type") == OURS:
        return load_text(json.dumps(content["scmoe"]), source)
    given, problems, _ = READERS[content["model_type"]](content)
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")
    length = content.get("n_positions") or content.get("max_position_embeddings")
    words = {
        "moe.architecture": "dense",
        **given,
        "data.seq_len": length,
        "data.name": "synthetic",
        "moe.capacity_factor": None,
    }
    return load_text(json.dumps(words), source)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json. ValueError: there is none, or it is of a model that is not read here."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = content["model_type"] in (OURS, *READERS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: config.json cannot be read: {error!r}") from error
    if not known:
        raise ValueError(f"{folder}: model_type is {content['model_type']!r}, allowed: {', '.join((OURS, *READERS))}")
    return content
