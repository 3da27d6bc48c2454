"""Our MoE modules equal those of transformers in outputs and all gradients, with the same random weights.

Mixtral        top-2, SwiGLU: standard top-k (Eq. 1)
OLMoE          top-k without renormalisation
Qwen2-MoE      a shared expert weighed by a sigmoid: CG-1 (Eq. 15)
Switch         top-1, the raw probability as weight
LongCat-Flash  the shortcut: the MoE reads the first sub-layer's post-attention norm, its output is added at the end,
               which is Pos-2 with a shared tap norm and Direct Add

The tolerance is that of tests/support/peers.py.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import SharedExpertBlock
from scmoe.blocks.sublayers import MLP, Residual
from scmoe.moe.coefficient import CG1, DirectAdd
from scmoe.moe.router import Router
from scmoe.schedule.schedule import Schedule
from tests.support.peers import DIM, EXPERTS, FFN, Called, Take, check_equal, stacked, stream, swiglu_mlp, under

pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("family", "top_k", "renormalise"), [("Mixtral", 2, True), ("Olmoe", 3, False)])
def test_experts_without_a_shared_one(family, top_k, renormalise):
    modeling = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    sizes = {"hidden_size": DIM, "intermediate_size": FFN, "num_experts_per_tok": top_k}
    experts = {"num_local_experts": EXPERTS} if renormalise else {"num_experts": EXPERTS, "norm_topk_prob": False}
    config = getattr(modeling, f"{family}Config")(**sizes, **experts)
    theirs, ours = getattr(modeling, f"{family}SparseMoeBlock")(config), stream(top_k, renormalise)

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {"router.gate.weight": take(theirs.gate.weight), **stacked(theirs.experts, take)}

    check_equal(ours, theirs, weights, lambda x: ours(x).y_BSD, theirs)


def test_qwen2_moe():
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

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
    moe = stream(top_k=2, renormalise=False)
    schedule = Schedule("shared_expert", None, 0)
    ours = SharedExpertBlock([], nn.Identity(), moe, schedule, shared_expert=shared_expert, coefficient=CG1(DIM))

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

    config = SwitchTransformersConfig(d_model=DIM, num_experts=EXPERTS, expert_capacity=100, router_jitter_noise=0.0)
    theirs, ours = SwitchTransformersTop1Router(config), Router(DIM, EXPERTS, 1)

    def run_ours(x: Tensor) -> Tensor:
        """Returns the logits, and the weight in the chosen expert's column, so that weight and choice are compared."""
        routing = ours(x.flatten(0, 1))
        column_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.topk_ids_TK, routing.topk_weights_TK)
        return torch.stack([column_TE, routing.logits_TE])

    def run_theirs(x: Tensor) -> Tensor:
        one_hot, weight, logits = theirs(x.flatten(0, 1))
        return torch.stack([one_hot * weight, logits])

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {"gate.weight": take(theirs.classifier.weight)}

    check_equal(ours, theirs, weights, run_ours, run_theirs)


def test_longcat_flash():
    """Norms, MLPs, gate, experts and all wiring are ours; the two attention modules are theirs."""
    from transformers.models.longcat_flash import modeling_longcat_flash as longcat
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig

    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = LongcatFlashConfig(
        **{"hidden_size": DIM, "num_layers": 1, "num_attention_heads": 2, "head_dim": 4, **sizes},
        **{"ffn_hidden_size": 32, "expert_ffn_hidden_size": FFN, "n_routed_experts": EXPERTS, "zero_expert_num": 0},
        **{"moe_topk": 2, "routed_scaling_factor": 1.0, "attn_implementation": "sdpa"},
    )
    theirs, rotary = longcat.LongcatFlashDecoderLayer(config, 0), longcat.LongcatFlashRotaryEmbedding(config)
    angles = rotary(torch.zeros(1, 10, DIM), torch.arange(10)[None])

    def norm() -> nn.Module:
        return nn.RMSNorm(DIM, config.rms_norm_eps)

    def mlp() -> MLP:
        return MLP(DIM, 32, bias=False, activation="swiglu")

    attention = [Called(longcat.LongcatFlashMLA(config, i), angles) for i in range(2)]
    sublayers = [Residual(norm(), attention[0]), Residual(norm(), mlp()), Residual(norm(), attention[1])]
    ours = ShortcutBlock(
        sublayers,
        tap_norm=sublayers[1].norm,
        norm=norm(),
        shared_expert=mlp(),
        coefficient=DirectAdd(DIM),
        moe=stream(top_k=2, renormalise=False),
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
            **under("moe", stacked(theirs.mlp.experts, take)),
        }

    check_equal(ours, theirs, weights, lambda x: ours(x).y_BSD, lambda x: theirs(x, position_embeddings=angles))
