"""DGMoE gives the two halves of a token distinct experts, hides transfers, and can share one module in two pairs.

test_reference_equality.py compares outputs and gradients with Eq. 23, test_schedule.py the order of operators;
tests/distributed/test_extensions.py tests several ranks and checkpoints.
"""

import pytest
import torch
from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock, add_stats, share_moe
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router, round_robin
from scmoe.parallel.mesh import ParallelContext
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model, build_module
from scmoe.training.run.printout import count_parameters, total_and_active
from tests.support.models import DIM, EXPERTS, randomise, tiny, tiny_batch, tiny_model, tiny_stream, tiny_sublayers
from tests.support.recording import Log, Recorded, RecordingDispatcher, between


def double_gate_block(schedule: Schedule, stream=None) -> DoubleGateBlock:
    stream = stream or tiny_stream(1)
    block = DoubleGateBlock(tiny_sublayers(), nn.LayerNorm(DIM), stream, schedule, tap_norm=nn.LayerNorm(DIM))
    return randomise(block.double(), seed=1)


# ---------------------------------------------------------------------- the rule


def test_if_the_best_expert_is_taken_the_second_best_is_chosen_with_its_own_probability():
    router = Router(3, 3, 1)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
    x_TD = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 5.0]])
    routing = router(x_TD, None, torch.tensor([[0], [1], [3], [2]]))  # 3 means none
    assert routing.topk_ids_TK[:3].tolist() == [[1], [0], [0]]
    assert routing.topk_ids_TK[3].item() in (0, 1), "a tie, but not the expert that is taken"
    scores = torch.tensor([3.0, 2.0, 1.0]).softmax(0)
    assert torch.allclose(routing.topk_weights_TK[:2, 0], scores[[1, 0]])


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_ties_do_not_select_the_taken_expert(value):
    router = Router(4, 2, 1)
    nn.init.constant_(router.gate.weight, value)
    x_TD = torch.ones(6, 4)
    excluded_T1 = torch.tensor([[0], [1]] * 3)
    assert (router(x_TD, None, excluded_T1).topk_ids_TK == 1 - excluded_T1).all()


def test_padding_takes_no_expert_and_a_balanced_gate_stays_balanced():
    router, x_TD = Router(DIM, EXPERTS, 1, deal=round_robin(EXPERTS, 1)), torch.randn(2 * EXPERTS, DIM)
    first = router(x_TD)
    second = router(x_TD, None, first.topk_ids_TK)
    assert (first.topk_ids_TK != second.topk_ids_TK).all()
    assert second.topk_ids_TK.flatten().bincount().tolist() == [2] * EXPERTS
    mask_T = torch.arange(2 * EXPERTS) < 5
    padded = router(x_TD, mask_T, router(x_TD, mask_T).topk_ids_TK)
    assert (padded.topk_ids_TK[5:] == EXPERTS).all() and (padded.topk_weights_TK[5:] == 0).all()


def test_the_two_halves_of_a_token_go_to_two_experts(monkeypatch):
    """Without the rule, many tokens, but not all, would use one expert twice."""
    routings, without_rule, forward = [], [], Router.forward

    def spy(self, x_TD, mask_T=None, excluded_T1=None):
        routings.append(forward(self, x_TD, mask_T, excluded_T1))
        without_rule.append(forward(self, x_TD, mask_T))
        return routings[-1]

    monkeypatch.setattr(Router, "forward", spy)
    config = tiny("moe.architecture=dgmoe", "data.seq_len=64")
    tiny_model(config)(tiny_batch(config)[0])
    preceding, current = (r.topk_ids_TK for r in routings)
    free = without_rule[1].topk_ids_TK
    repeated = free == preceding
    assert 0.1 < repeated.double().mean() < 0.9
    assert (current != preceding).all()
    assert (current == free)[~repeated].all()


def test_both_halves_count_as_load():
    block, x_BSD = double_gate_block(Schedule("dgmoe", "pos2")), torch.randn(2, 7, DIM, dtype=torch.float64)
    stats = block(x_BSD, torch.arange(7).expand(2, 7) < 5).stats
    assert stats.num_tokens == stats.counts_E.sum() == 2 * 10
    assert stats.score_sums_E.sum().item() == pytest.approx(20)
    assert [t.item() for t in add_stats(stats, stats)[2:5]] == [2 * t.item() for t in stats[2:5]]


# ---------------------------------------------------------------------- schedule


@pytest.mark.parametrize("position, slot", [(p, s) for p in (1, 2, 3) for s in range(p + 1)])
def test_the_preceding_halfs_transfers_hide_behind_the_backbone_and_backward_mirrors_forward(position, slot):
    """Combine also hides behind the current half's experts; the current half's own transfers are exposed."""
    log, schedule = Log(), Schedule("dgmoe", f"pos{position}", slot)
    stream = tiny_stream(1, dispatcher=RecordingDispatcher(log))
    stream.experts = Recorded("experts", stream.experts, log)
    block = double_gate_block(schedule, stream)
    names = ("attention", "mlp", "attention")
    block.sublayers = nn.ModuleList(Recorded(*part, log) for part in zip(names, block.sublayers, strict=True))
    x_BSD = torch.randn(2, 6, DIM, dtype=torch.float64)
    block(x_BSD.requires_grad_()).y_BSD.square().sum().backward()

    # transfers are numbered in order of their start: the preceding half's come first
    before, after = list(schedule.window[:slot]), list(schedule.window[slot:])
    assert between(log.forward, "dispatch 0 start", "dispatch 0 wait") == before
    assert between(log.forward, "combine 0 start", "combine 0 wait") == [*after, "experts"]
    assert between(log.forward, "dispatch 1 start", "combine 1 wait") == ["experts"]
    assert log.backward == log.forward[::-1]


# ---------------------------------------------------------------------- DGMoE-Share


def test_every_second_pair_shares_the_module_of_the_pair_before_it():
    blocks = [double_gate_block(Schedule("dgmoe", "pos2"), tiny_stream(1, seed=i)) for i in range(5)]
    share_moe(blocks)
    modules = [block.moe for block in blocks]
    assert modules[0] is modules[1] and modules[2] is modules[3]
    assert len({id(m) for m in modules}) == 3


def test_a_shared_module_is_initialised_counted_and_optimized_once():
    config = tiny("moe.architecture=dgmoe_share", "model.layers=4")
    model = build_model(config, ParallelContext())
    assert sum(isinstance(m, Experts) for m in model.modules()) == 1
    total, active = total_and_active(count_parameters(model))
    assert total == sum(p.numel() for p in model.parameters())
    experts = count_parameters(model)["experts"]
    assert experts[1:] == (6 * 2 * 16 * 24, 4 * 2 * 16 * 24), "a token uses two experts in each of two pairs"
    assert active == total - 2 * 2 * 16 * 24
    alone = build_model(tiny("moe.architecture=dgmoe", "model.layers=4"), ParallelContext())
    assert torch.equal(model.blocks[1].moe.experts.w_in_eDF, alone.blocks[0].moe.experts.w_in_eDF)

    module = build_module(config)
    module.configure_model()
    module.trainer = None
    groups = module.configure_optimizers()["optimizer"].param_groups
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(module.parameters()))
