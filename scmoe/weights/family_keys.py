"""How a config.json of transformers' models relates to our configuration.

FAMILY_KEYS: our keys and theirs. ALWAYS: values that our models have. FAMILY_DEFAULTS: what a
config.json leaves out.
"""

from typing import Any

from scmoe.blocks.rotary import MOST_TURNS, YARN_POSITIONS

LLAMA_KEYS = {  # our key: theirs
    "model.layers": "num_hidden_layers",
    "model.dim": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.head_dim": "head_dim",
    "model.ffn_dim": "intermediate_size",
    "model.norm_eps": "rms_norm_eps",
    "model.rope_theta": "rope_theta",
    "data.vocab_size": "vocab_size",
}
LATENT_KEYS = {
    "model.layers": "num_hidden_layers",
    "model.dim": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.norm_eps": "rms_norm_eps",
    "model.rope_theta": "rope_theta",
    "data.vocab_size": "vocab_size",
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
FAMILY_KEYS = {
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
DEEPSEEK_VALUES = {
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
    "deepseek_v3": {**DEEPSEEK_VALUES, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "instella_moe": {
        **DEEPSEEK_VALUES,
        "farskip": True,
        "gated_attention": True,
        "farskip_start_idx": 0,
        "attn_only_farskip": False,
        "mlp_only_farskip": False,
    },
    "longcat_flash": {
        "router_bias": False,
        "zero_expert_type": "identity",
        "attention_method": "MLA",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "norm_topk_prob": False,
    },
}
# transformers' values for what a config.json leaves out
FAMILY_DEFAULTS: dict[str, dict[str, float]] = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "deepseek_v3": {"n_group": 8, "topk_group": 4},
    "longcat_flash": {"rms_norm_eps": 1e-5, "rope_theta": 1e7},
}
YARN = {  # all but the factor
    "original_max_position_embeddings": YARN_POSITIONS,
    "beta_fast": MOST_TURNS,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
