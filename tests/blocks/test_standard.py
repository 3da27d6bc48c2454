"""Our MoE modules equal those of transformers in outputs and all gradients, with the same random
weights.

Mixtral        top-2, SwiGLU: standard top-k (Eq. 1)
OLMoE          top-k without renormalisation
Qwen2-MoE      a shared expert weighed by a sigmoid: CG-1 (Eq. 15)
Switch         top-1, the raw probability as weight
DeepSeek-V3    sigmoid scores, a selection bias, normalised weights times gamma, a shared expert
               (Direct Add)
LongCat-Flash  the shortcut: the MoE reads the first sub-layer's post-attention norm, its output is
               added at the end, which is Pos-2 with a shared tap norm and Direct Add; zero experts,
               a selection bias, raw weights times gamma

The tolerance is that of tests/support/peers.py, 2e-6 for DeepSeek-V3 and LongCat-Flash.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import SharedExpertBlock
from scmoe.blocks.sublayers import MLP, Residual
from scmoe.moe.coefficient import CG1, DirectAdd
from scmoe.moe.router import Router, Scoring, by_sign, in_proportion
from scmoe.moe.tokens import Routing
from scmoe.schedule.schedule import Schedule
from tests.support.peers import (
    DIM,
    EXPERTS,
    FFN,
    Called,
    Take,
    check_equal,
    stacked,
    stream,
    swiglu_mlp,
    under,
)

pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers

CLOSE = 2e-6
SIGMOID = Scoring(torch.sigmoid, sums_to_one=False, scale=2.5, rule=by_sign)


@pytest.mark.parametrize(
    ("family", "top_k", "renormalise"), [("Mixtral", 2, True), ("Olmoe", 3, False)]
)
def test_experts_without_a_shared_one(family, top_k, renormalise):
    modeling = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    sizes = {"hidden_size": DIM, "intermediate_size": FFN, "num_experts_per_tok": top_k}
    experts = (
        {"num_local_experts": EXPERTS}
        if renormalise
        else {"num_experts": EXPERTS, "norm_topk_prob": False}
    )
    config = getattr(modeling, f"{family}Config")(**sizes, **experts)
    theirs, ours = (
        getattr(modeling, f"{family}SparseMoeBlock")(config),
        stream(top_k, Scoring(normalise=renormalise)),
    )

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {"router.gate.weight": take(theirs.gate.weight), **stacked(theirs.experts, take)}

    check_equal(ours, theirs, weights, lambda x: ours(x).y_BSD, theirs)


def test_qwen2_moe():
    from transformers.models.qwen2_moe.modeling_qwen2_moe import (
        Qwen2MoeConfig,
        Qwen2MoeSparseMoeBlock,
    )

    config = Qwen2MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=FFN,
        shared_expert_intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    theirs = Qwen2MoeSparseMoeBlock(config)
    shared_expert = MLP(DIM, 32, bias=False, activation="swiglu")
    moe = stream(2, Scoring(normalise=False))
    schedule = Schedule("shared_expert", None, 0)
    ours = SharedExpertBlock(
        [], nn.Identity(), moe, schedule, shared_expert=shared_expert, coefficient=CG1(DIM)
    )

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {
            **under("shared_expert", swiglu_mlp(theirs.shared_expert, take)),
            "coefficient.gate.weight": take(theirs.shared_expert_gate.weight),
            "moe.router.gate.weight": take(theirs.gate.weight),
            **under("moe", stacked(theirs.experts, take)),
        }

    check_equal(ours, theirs, weights, lambda x: ours(x).y_BSD - x, theirs)


def test_switch_router():
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersConfig,
        SwitchTransformersTop1Router,
    )

    config = SwitchTransformersConfig(
        d_model=DIM, num_experts=EXPERTS, expert_capacity=100, router_jitter_noise=0.0
    )
    theirs, ours = SwitchTransformersTop1Router(config), Router(DIM, EXPERTS, 1)

    def run_theirs(x: Tensor) -> Tensor:
        one_hot, weight, logits = theirs(x.flatten(0, 1))
        return torch.stack([one_hot * weight, logits])

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {"gate.weight": take(theirs.classifier.weight)}

    check_equal(
        ours, theirs, weights, lambda x: columns(*decision(ours(x.flatten(0, 1)))), run_theirs
    )


def decision(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    return routing.logits_TE, routing.topk_weights_TK, routing.topk_ids_TK


def columns(logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    """Return the logits, and the weights in the chosen experts' columns, so that weights and
    choices are compared."""
    return torch.stack([torch.zeros_like(logits_TE).scatter(1, ids_TK, weights_TK), logits_TE])


def deepseek_config(num_experts: int, top_k: int) -> Any:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

    sizes = {
        "hidden_size": DIM,
        "moe_intermediate_size": FFN,
        "n_routed_experts": num_experts,
        "n_shared_experts": 2,
    }
    router = {
        "num_experts_per_tok": top_k,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    }
    return DeepseekV3Config(**sizes, **router, norm_topk_prob=True, rms_norm_eps=1e-2)


def test_deepseek_v3_router():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs, ours = DeepseekV3TopkRouter(deepseek_config(8, 3)), Router(DIM, 8, 3, scoring=SIGMOID)

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {
            "gate.weight": take(theirs.weight),
            "bias.weight": take(theirs.e_score_correction_bias),
        }

    def run_ours(x: Tensor) -> Tensor:
        return columns(*decision(ours(x.flatten(0, 1))))

    check_equal(ours, theirs, weights, run_ours, lambda x: columns(*theirs(x)), CLOSE)


def test_deepseek_v3_with_a_shared_expert():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    theirs = DeepseekV3MoE(deepseek_config(EXPERTS, 3))
    ours = SharedExpertBlock(
        [],
        nn.Identity(),
        stream(3, SIGMOID),
        Schedule("shared_expert", None, 0),
        shared_expert=MLP(DIM, 2 * FFN, bias=False, activation="swiglu"),
        coefficient=DirectAdd(DIM),
    )

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {
            **under("shared_expert", swiglu_mlp(theirs.shared_experts, take)),
            "moe.router.gate.weight": take(theirs.gate.weight),
            "moe.router.bias.weight": take(theirs.gate.e_score_correction_bias),
            **under("moe", stacked(theirs.experts, take)),
        }

    check_equal(ours, theirs, weights, lambda x: ours(x).y_BSD - x, theirs, CLOSE)


def test_longcat_flash_router():
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

    sizes = {"hidden_size": DIM, "n_routed_experts": EXPERTS, "zero_expert_num": 3, "moe_topk": 3}
    theirs = LongcatFlashTopkRouter(LongcatFlashConfig(**sizes, routed_scaling_factor=6.0))
    scoring = Scoring(normalise=False, scale=6, rule=in_proportion)
    ours = Router(DIM, EXPERTS, 3, scoring=scoring, zero_experts=3)

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {
            "gate.weight": take(theirs.classifier.weight),
            "bias.weight": take(theirs.e_score_correction_bias),
        }

    def run_ours(x: Tensor) -> Tensor:
        return columns(*decision(ours(x.flatten(0, 1))))

    check_equal(ours, theirs, weights, run_ours, lambda x: columns(*theirs(x)), CLOSE)


@pytest.mark.parametrize("zero_experts", (0, 3))
def test_longcat_flash(zero_experts):
    """Norms, MLPs, gate, experts and all wiring are ours; the two attention modules are theirs."""
    from transformers.models.longcat_flash import modeling_longcat_flash as longcat
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig

    sizes = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    config = LongcatFlashConfig(
        **{"hidden_size": DIM, "num_layers": 1, "num_attention_heads": 2, "head_dim": 4, **sizes},
        **{"ffn_hidden_size": 32, "expert_ffn_hidden_size": FFN, "n_routed_experts": EXPERTS},
        **{
            "zero_expert_num": zero_experts,
            "moe_topk": 3,
            "routed_scaling_factor": 6.0,
            "rms_norm_eps": 1e-2,
        },
        attn_implementation="sdpa",
    )
    theirs, rotary = (
        longcat.LongcatFlashDecoderLayer(config, 0),
        longcat.LongcatFlashRotaryEmbedding(config),
    )
    angles = rotary(torch.zeros(1, 10, DIM), torch.arange(10)[None])

    def norm() -> nn.Module:
        return nn.RMSNorm(DIM, config.rms_norm_eps)

    def mlp() -> MLP:
        return MLP(DIM, 32, bias=False, activation="swiglu")

    attention = [Called(longcat.LongcatFlashMLA(config, i), angles) for i in range(2)]
    sublayers = [
        Residual(norm(), attention[0]),
        Residual(norm(), mlp()),
        Residual(norm(), attention[1]),
    ]
    ours = ShortcutBlock(
        sublayers,
        tap_norm=sublayers[1].norm,
        norm=norm(),
        shared_expert=mlp(),
        coefficient=DirectAdd(DIM),
        moe=stream(3, Scoring(normalise=False, scale=6, rule=in_proportion), zero_experts),
        schedule=Schedule("scmoe", "pos2"),
    )

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        attention = [dict(attention.named_parameters()) for attention in theirs.self_attn]
        attention = [{name: take(p) for name, p in parameters.items()} for parameters in attention]
        return {
            "sublayers.0.norm.weight": take(theirs.input_layernorm[0].weight),
            **under("sublayers.0.f.attention", attention[0]),
            "sublayers.1.norm.weight": take(theirs.post_attention_layernorm[0].weight),
            **under("sublayers.1.f", swiglu_mlp(theirs.mlps[0], take)),
            "sublayers.2.norm.weight": take(theirs.input_layernorm[1].weight),
            **under("sublayers.2.f.attention", attention[1]),
            "norm.weight": take(theirs.post_attention_layernorm[1].weight),
            **under("shared_expert", swiglu_mlp(theirs.mlps[1], take)),
            "moe.router.gate.weight": take(theirs.mlp.router.classifier.weight),
            "moe.router.bias.weight": take(theirs.mlp.router.e_score_correction_bias),
            **under("moe", stacked(theirs.mlp.experts, take)),
        }

    def run_theirs(x: Tensor) -> Tensor:
        return theirs(x, position_embeddings=angles)

    check_equal(ours, theirs, weights, lambda x: ours(x).y_BSD, run_theirs, CLOSE)
