"""DGMoE gives the two halves of a token distinct experts, hides transfers, and can share one module
in two pairs.

test_reference_equality.py compares outputs and gradients with Eq. 23, test_schedule.py the order of
operators; tests/config/test_registry_ranks.py tests several ranks and checkpoints.
"""

import pytest
import torch
from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.models.model_cost import count_parameters, total_and_active
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router, round_robin
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model, build_module
from tests.support.models import DIM, EXPERTS, tiny, tiny_stream, tiny_sublayers
from tests.support.recording import Log, Recorded, RecordingDispatcher, between

# ---------------------------------------------------------------------- the rule


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_ties_do_not_select_the_taken_expert(value):
    router = Router(4, 2, 1)
    nn.init.constant_(router.gate.weight, value)
    x_TD = torch.ones(6, 4)
    excluded_T1 = torch.tensor([[0], [1]] * 3)
    assert (router(x_TD, None, excluded_T1).topk_ids_TK == 1 - excluded_T1).all()


def test_padding_takes_no_expert_and_a_balanced_gate_stays_balanced():
    router, x_TD = (
        Router(DIM, EXPERTS, 1, deal=round_robin(EXPERTS, 1)),
        torch.randn(2 * EXPERTS, DIM),
    )
    first = router(x_TD)
    second = router(x_TD, None, first.topk_ids_TK)
    assert (first.topk_ids_TK != second.topk_ids_TK).all()
    assert second.topk_ids_TK.flatten().bincount().tolist() == [2] * EXPERTS
    mask_T = torch.arange(2 * EXPERTS) < 5
    padded = router(x_TD, mask_T, router(x_TD, mask_T).topk_ids_TK)
    assert (padded.topk_ids_TK[5:] == EXPERTS).all() and (padded.topk_weights_TK[5:] == 0).all()


def test_without_the_rule_both_halves_may_go_to_one_expert():
    """A gate of zeros prefers the first expert for each of 12 tokens, in both halves."""
    x_BSD = torch.randn(2, 6, DIM, dtype=torch.float64)
    for distinct, most in ((True, 12), (False, 24)):
        block = DoubleGateBlock(
            tiny_sublayers(),
            nn.LayerNorm(DIM),
            tiny_stream(1),
            Schedule("dgmoe", "pos2"),
            tap_norm=nn.LayerNorm(DIM),
            distinct_experts=distinct,
        ).double()
        nn.init.zeros_(block.moe.router.gate.weight)
        assert block(x_BSD).stats.counts_E.max() == most


# ---------------------------------------------------------------------- schedule


@pytest.mark.parametrize("position, slot", [(p, s) for p in (1, 2, 3) for s in range(p + 1)])
def test_the_preceding_halfs_transfers_hide_behind_the_backbone_and_backward_mirrors_forward(
    position, slot
):
    """Combine also hides behind the current half's experts; the current half's own transfers are
    exposed."""
    log, schedule = Log(), Schedule("dgmoe", f"pos{position}", slot)
    stream = tiny_stream(1, dispatcher=RecordingDispatcher(log))
    stream.experts = Recorded("experts", stream.experts, log)
    names = ("attention", "mlp", "attention")
    sublayers = [Recorded(*part, log) for part in zip(names, tiny_sublayers(), strict=True)]
    block = DoubleGateBlock(
        sublayers, nn.LayerNorm(DIM), stream, schedule, tap_norm=nn.LayerNorm(DIM)
    ).double()
    x_BSD = torch.randn(2, 6, DIM, dtype=torch.float64)
    block(x_BSD.requires_grad_()).y_BSD.square().sum().backward()

    # transfers are numbered in order of their start: the preceding half's come first
    before, after = list(schedule.window[:slot]), list(schedule.window[slot:])
    assert between(log.forward, "dispatch 0 start", "dispatch 0 wait") == before
    assert between(log.forward, "combine 0 start", "combine 0 wait") == [*after, "experts"]
    assert between(log.forward, "dispatch 1 start", "combine 1 wait") == ["experts"]
    assert log.backward == log.forward[::-1]


# ---------------------------------------------------------------------- DGMoE-Share


def test_a_shared_module_is_initialised_counted_and_optimized_once():
    config = tiny("moe.architecture=dgmoe_share", "model.layers=4")
    model = build_model(config)
    assert sum(isinstance(m, Experts) for m in model.modules()) == 1
    total, active = total_and_active(count_parameters(model))
    assert total == sum(p.numel() for p in model.parameters())
    experts = count_parameters(model)["experts"]
    assert experts[1:] == (6 * 2 * 16 * 24, 4 * 2 * 16 * 24), (
        "a token uses two experts in each of two pairs"
    )
    assert active == total - 2 * 2 * 16 * 24
    alone = build_model(tiny("moe.architecture=dgmoe", "model.layers=4"))
    assert torch.equal(model.blocks[1].moe.experts.w_in_eDF, alone.blocks[0].moe.experts.w_in_eDF)

    module = build_module(config)
    module.configure_model()
    module.trainer = None
    groups = module.configure_optimizers()["optimizer"].param_groups
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(module.parameters()))
