"""Fig. 9's quantities equal those by hand, and the probe reads what the gate reads and removes its
hooks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scmoe.config.load import load_config
from scmoe.moe.router import Router, Scoring, by_sign
from scmoe.training.assembly.model import build_model
from scmoe.training.callbacks.representations import GatingProbe, gating_metrics, gating_sums, means
from tests.support.models import assert_close, hooks, randomise, tiny, tiny_batch, tiny_model


def gate_of(weight_ED: torch.Tensor, **switches: Any) -> Router:
    router = Router(weight_ED.shape[1], weight_ED.shape[0], 1, **switches)
    router.gate.weight.data.copy_(weight_ED)
    return router


def test_the_gates_own_scores_and_bias_are_used():
    """Sigmoids of log 3 and 0 are 3/4 and 1/2; a bias of 1 lets the second expert be the preferred
    one."""
    router = gate_of(torch.eye(2), scoring=Scoring(torch.sigmoid, sums_to_one=False, rule=by_sign))
    x = torch.tensor([[math.log(3), 0.0]])
    assert gating_sums(x, x, router)[2:4].tolist() == pytest.approx([0.75, 0.75])
    router.bias.weight.data.copy_(torch.tensor([0.0, 1.0]))
    assert gating_sums(x, x, router)[2:4].tolist() == pytest.approx([0.5, 0.5])


def test_quantities_equal_those_by_hand():
    """Two experts have the representation itself as logits: the logits log 3 and 0 give a
    probability of 3/4."""
    a, b = math.log(3), math.log(9)
    current = torch.tensor([[a, 0.0], [0.0, a], [b, 0.0]])
    preceding = torch.tensor([[b, 0.0], [a, 0.0], [b, 0.0]])
    router = gate_of(torch.eye(2))
    sums = gating_sums(current, preceding, router)
    distances = [b - a, math.hypot(a, a), 0.0]
    assert sums.tolist() == pytest.approx(
        [2, sum(distances), 0.75 + 0.75 + 0.9, 0.9 + 0.75 + 0.9, 3]
    )
    assert means(sums[None])[0].tolist() == pytest.approx([x / 3 for x in sums[:4].tolist()])
    # DGMoE: if both would choose the same expert, the current one gets its second best: 1/4 and
    # 1/10
    assert gating_sums(current, preceding, router, distinct=True)[2].item() == pytest.approx(
        0.25 + 0.75 + 0.1
    )


def test_sums_add_up_over_ranks_and_metrics_are_means_over_layers():
    x, y = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0))
    gate = gate_of(torch.eye(4))
    parts = gating_sums(x[:3], y[:3], gate) + gating_sums(x[3:], y[3:], gate)
    assert_close(parts, gating_sums(x, y, gate), 1e-6)  # float32 norms and softmax of other shapes
    metrics = gating_metrics(np.array([[0.5, 1.0, 0.2, 0.4], [0.7, 3.0, 0.4, 0.4]]))
    expected = {
        "repeated_selection": 0.6,
        "l2_distance": 2.0,
        "score_current": 0.3,
        "score_preceding": 0.4,
    }
    assert metrics == pytest.approx({f"gating/{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("position", ("pos1", "pos2", "pos3"))
def test_the_probe_reads_what_dgmoes_gate_reads(position, monkeypatch):
    routings, forward = [], Router.forward

    def spy(self, x_TD, mask_T=None, excluded_T1=None):
        routing = forward(self, x_TD, mask_T, excluded_T1)
        routings.append((x_TD.detach(), routing))
        return routing

    monkeypatch.setattr(Router, "forward", spy)
    config = tiny("moe.architecture=dgmoe", f"moe.position={position}", "model.layers=4")
    model = tiny_model(config)
    probe = GatingProbe(model)
    model(tiny_batch(config)[0])
    probe.remove()
    for layer, sums in enumerate(probe.result()):
        (before_x, before), (now_x, now) = routings[2 * layer : 2 * layer + 2]
        repeated = now.logits_TE.argmax(-1) == before.logits_TE.argmax(-1)
        scores = now.topk_weights_TK.sum(), before.topk_weights_TK.sum()
        expected = [repeated.sum(), (now_x - before_x).norm(dim=-1).sum(), *scores, 24]
        assert_close(
            sums, torch.tensor([float(value) for value in expected], dtype=torch.float64), 1e-12
        )
        assert 0 < repeated.sum() < 24
    assert probe.labels() == ["MoE layer 0", "MoE layer 1"]


@pytest.mark.parametrize("architecture", ("top_k", "shared_expert", "scmoe", "dgmoe_share"))
@pytest.mark.parametrize("position", ("pos1", "pos2", "pos3"))
def test_any_block_can_be_measured_and_is_unchanged_afterwards(architecture, position):
    words = (f"moe.architecture={architecture}", f"moe.position={position}", "model.layers=4")
    config = tiny(*words, "analysis.gating_every=1")
    model, (ids, _) = tiny_model(config), tiny_batch(config)
    plain, before = model(ids).logits_BSV, hooks(model)
    assert before == 0
    probe = GatingProbe(model, position)
    assert hooks(model) == 6, "the probe has three hooks for each MoE block"
    assert torch.equal(model(ids).logits_BSV, plain)
    probe.remove()
    assert hooks(model) == 0
    found = means(probe.result())
    assert (
        found.shape == (2, 4)
        and (found[:, 1] > 0).all()
        and (found[:, 0] >= 0).all()
        and (found[:, 0] <= 1).all()
    )
    model(ids)
    assert len(probe.sums) == 2, "a removed probe measures nothing more"


def test_a_tap_in_the_preceding_block_is_read_there():
    config = tiny("moe.every=1", "moe.position=pos2", "model.layers=3")
    model, seen = tiny_model(config), []
    for block in model.blocks:
        block.tap_norm.register_forward_hook(
            lambda _, args, output: seen.append(output.detach().flatten(0, 1))
        )
        block.norm.register_forward_hook(
            lambda _, args, output: seen.append(output.detach().flatten(0, 1))
        )
    probe = GatingProbe(model)
    model(tiny_batch(config)[0])
    for block, preceding, current, sums in zip(
        model.blocks, seen[::2], seen[1::2], probe.sums, strict=True
    ):
        assert_close(sums, gating_sums(current, preceding, block.moe.router))


def test_equal_representations_repeat_all_selections():
    """At Pos-1 of a block whose last attention writes nothing, current and preceding are equal."""
    config = tiny("moe.architecture=top_k")
    model = tiny_model(config)
    nn.init.zeros_(model.blocks[0].sublayers[2].f.out.weight)
    nn.init.zeros_(model.blocks[0].sublayers[2].f.out.bias)
    probe = GatingProbe(model, "pos1")
    model(tiny_batch(config)[0])
    repeated, distance, current, preceding = means(probe.result())[0]
    assert repeated == 1 and distance == 0 and current == preceding


@pytest.mark.parametrize("architecture", ("top_k", "scmoe", "dgmoe"))
def test_image_models_are_measured_layer_by_layer(architecture):
    """Fig. 9 shows SwinV2-MoE. Here two pairs of stage 3 have 4 x 4 places, and stage 4's baseline
    has 2 x 2."""
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    words = (
        *(
            "model.family=swin",
            "model.layers=4",
            "model.dim=8",
            "model.heads=1",
            "model.patch_size=2",
        ),
        *("model.window=2", "data.name=digits", "data.image_size=32", "data.num_classes=5"),
    )
    config = load_config(None, [*words, f"moe.architecture={architecture}"])
    model = randomise(build_model(config).double())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain, read = model(images).logits_BC, []
    routers = [block.moe.router for block in model.blocks if hasattr(block, "moe")]
    watched = [
        r.register_forward_pre_hook(lambda _, args: read.append(args[0].detach())) for r in routers
    ]
    probe = GatingProbe(model)
    assert torch.equal(model(images).logits_BC, plain)
    probe.remove()
    for handle in watched:
        handle.remove()
    assert hooks(model) == 0
    sums = probe.result()
    assert sums[:, 4].tolist() == [3 * 16, 3 * 16, 3 * 4]
    assert (sums[:, 1] > 0).all(), "the two representations differ"
    if architecture == "dgmoe":  # its gate reads both, one after the other
        before, now = read[0], read[1]
        assert_close(sums[0, 1], (now - before).norm(dim=-1).sum(), 1e-12)


def test_padding_is_left_out():
    config = tiny("moe.architecture=scmoe", "moe.capacity_factor=null")
    model, (ids, _) = tiny_model(config), tiny_batch(config, 1)
    probe = GatingProbe(model)
    model(ids, torch.arange(12)[None] < 8)
    model(ids[:, :8])
    padded, short = probe.result()
    assert padded[4] == short[4] == 8
    assert_close(padded, short, 1e-12)
