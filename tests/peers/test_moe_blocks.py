"""Our MoE modules equal those of transformers in outputs and all gradients, with the same random weights.

Mixtral        top-2, SwiGLU: standard top-k (Eq. 1)
OLMoE          top-k without renormalisation
Qwen2-MoE      a shared expert weighed by a sigmoid: CG-1 (Eq. 15)
Switch         top-1, the raw probability as weight

DeepSeek-V3 and LongCat-Flash are compared as whole models in test_family_folders.py.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from scmoe.blocks.standard import SharedExpertBlock
from scmoe.blocks.sublayers import MLP
from scmoe.moe.coefficient import CG1
from scmoe.moe.router import Router, Scoring
from scmoe.schedule.schedule import Schedule
from tests.support.peers import DIM, EXPERTS, FFN, Take, check_equal, stacked, stream, swiglu_mlp, under

pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("family", "top_k", "renormalise"), [("Mixtral", 2, True), ("Olmoe", 3, False)])
def test_experts_without_a_shared_one(family, top_k, renormalise):
    modeling = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    sizes = {"hidden_size": DIM, "intermediate_size": FFN, "num_experts_per_tok": top_k}
    experts = {"num_local_experts": EXPERTS} if renormalise else {"num_experts": EXPERTS, "norm_topk_prob": False}
    config = getattr(modeling, f"{family}Config")(**sizes, **experts)
    theirs, ours = getattr(modeling, f"{family}SparseMoeBlock")(config), stream(top_k, Scoring(normalise=renormalise))

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
    moe = stream(2, Scoring(normalise=False))
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

    def run_theirs(x: Tensor) -> Tensor:
        one_hot, weight, logits = theirs(x.flatten(0, 1))
        return torch.stack([one_hot * weight, logits])

    def run_ours(x: Tensor) -> Tensor:
        """Returns the weight in the chosen expert's column, and the logits."""
        routing = ours(x.flatten(0, 1))
        one_hot_weight = torch.zeros_like(routing.logits_TE).scatter(1, routing.topk_ids_TK, routing.topk_weights_TK)
        return torch.stack([one_hot_weight, routing.logits_TE])

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        return {"gate.weight": take(theirs.classifier.weight)}

    check_equal(ours, theirs, weights, run_ours, run_theirs)
