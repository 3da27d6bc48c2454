"""A rank's FLOPs, sent bytes and parameters are those of a real tiny model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scmoe.config.load import load_config
from scmoe.models.model_cost import (
    count_parameters,
    forward_flops,
    moe_uses,
    routed_copies,
    total_and_active,
    training_flops,
)
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.predict.bound import rows_of_block, transfer_bytes
from scmoe.predict.costs import estimate
from scmoe.training.assembly.model import build_model, build_model_on_meta
from tests.support.models import one_of_two, tiny, tiny_batch, tiny_model

MODELS = {
    "dense": "moe.architecture=dense",
    "top-2": "moe.architecture=top_k moe.top_k=2",
    "top-2-dropless": "moe.architecture=top_k moe.top_k=2 moe.capacity_factor=null",
    "shared_expert": "moe.architecture=shared_expert moe.combine=cg2",
    "scmoe": "moe.architecture=scmoe moe.top_k=2 moe.noisy=true",
    "every-block": "moe.architecture=scmoe moe.position=pos1 moe.every=1",
    "every-fourth-block": "moe.every=4 model.layers=4",
    "dgmoe": "moe.architecture=dgmoe",
    "dgmoe_share": "moe.architecture=dgmoe_share model.layers=4",
    "zero-experts": (
        "moe.top_k=2 moe.router=longcat moe.zero_experts=6 moe.ffn_dim=40 moe.leading_dense=[56] "
        "model.layers=3"
    ),
    "farskip": "moe.architecture=farskip moe.every=1 moe.top_k=2",
    "pos2-every-block": "moe.every=1 moe.after_norm=true",
    "instella": (
        "model.family=llama moe.architecture=farskip moe.every=1 model.attention=latent"
        " model.latent.kv_rank=8 model.latent.q_rank=6 model.latent.nope_dim=6"
        " model.latent.rope_dim=4 model.latent.value_dim=5 model.latent.gated=true"
    ),
    "llama": (
        "model.family=llama model.heads=4 model.kv_heads=2 model.head_dim=12"
        " moe.every=1 moe.position=pos1"
    ),
}
BATCH = 2


def counted(model, batch, backward: bool) -> float:
    """Return a sample's FLOPs as torch counts them; with SDPBackend.MATH, as it does not count CPU
    flash attention."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(batch)[0]
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / len(batch)


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_parameters_are_those_of_a_real_rank(name):
    config = tiny(*MODELS[name].split())
    model, (ids, _) = tiny_model(config), tiny_batch(config, BATCH)
    forward = forward_flops(model, config.data.seq_len)
    assert sum(forward.values()) == counted(model, ids, backward=False)
    assert training_flops(forward) == counted(model, ids, backward=True)
    whole = sum(p.numel() for p in model.parameters())
    assert (
        total_and_active(count_parameters(model))[0] == estimate(config)["params_per_rank"] == whole
    )
    if name != "dense":
        with one_of_two() as wire:
            share = build_model(config, wire)
        facts = estimate(tiny(*MODELS[name].split(), "trainer.devices=2"))
        assert facts["params_per_rank"] == sum(p.numel() for p in share.parameters())
        assert total_and_active(count_parameters(share)) == total_and_active(
            count_parameters(model)
        )


def test_flops_by_hand():
    """The model has one layer, D 16, F 24, S 12, V 64."""
    forward = forward_flops(tiny_model(tiny("moe.architecture=dense", "model.layers=1")), 12)
    assert forward == {
        "attention": 12 * (2 * 4 * 16 * 16 + 4 * 12 * 16),
        "MLP": 12 * 2 * 2 * 16 * 24,
        "head": 12 * 2 * 16 * 64,
    }


def test_recomputing_adds_a_forward_pass_without_its_last_products():
    config = tiny("moe.architecture=scmoe", "trainer.recompute=true")
    model, (ids, _) = tiny_model(config), tiny_batch(config, BATCH)
    forward = forward_flops(model, 12)
    # last products of two attentions, an MLP and the shared expert
    spared = 12 * 2 * (2 * 16 * 16 + 2 * 24 * 16)
    assert training_flops(forward, recompute=True) - spared == counted(model, ids, backward=True)


class Weighing(LocalDispatcher):
    """Adds up the bytes that a real dispatcher would send."""

    dispatched = combined = 0

    def dispatch(self, rows_RD, counts):
        self.dispatched += rows_RD.nbytes
        return super().dispatch(rows_RD, counts)

    def combine(self, rows_RD, receipt):
        self.combined += rows_RD.nbytes
        return super().combine(rows_RD, receipt)


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "32-true") for name in MODELS if name != "dense"]
    + [("scmoe", "64-true"), ("scmoe", "bf16-mixed")],
)
def test_transfer_bytes_are_what_a_dispatcher_receives(name, precision):
    config, dtype = (
        tiny(*MODELS[name].split()),
        (torch.float64 if precision == "64-true" else torch.float32),
    )
    model, (ids, _) = tiny_model(config, dtype), tiny_batch(config, BATCH)
    weighing = Weighing()
    for moe, _ in moe_uses(model):
        moe.dispatcher = weighing
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        model(ids)
    assert (
        weighing.dispatched
        == weighing.combined
        == sum(transfer_bytes(model, precision)) * ids.numel()
        > 0
    )


def test_buffers_are_sent_whole_and_computed_as_far_as_they_are_filled():
    words = "trainer.devices=2 strategy.ep_size=2 moe.capacity_factor=null moe.dropless_ceiling="
    rows = "1.5 moe.rows=filled", "1.5 moe.rows=buffers", "9 moe.rows=buffers"
    filled, buffers, all_rows = (
        build_model_on_meta(tiny(*f"{words}{ceiling}".split())) for ceiling in rows
    )
    assert forward_flops(buffers, 12) == forward_flops(filled, 12)
    sent = transfer_bytes(filled, "32-true")
    assert transfer_bytes(filled, "32-true", 2) == [size / 2 for size in sent]
    assert transfer_bytes(buffers, "32-true") == [1.5 * size for size in sent]
    assert transfer_bytes(all_rows, "32-true") == [
        2 * size for size in sent
    ]  # of two ranks none receives more


def test_filled_slots_are_sent_and_announced_alone():
    filled, slots = (
        build_model_on_meta(tiny("moe.capacity_factor=2", f"moe.rows={rows}"))
        for rows in ("filled", "slots")
    )
    experts, top_k = filled.blocks[0].moe.router.num_experts, filled.blocks[0].moe.router.top_k
    assert rows_of_block(filled.blocks[0], tokens=66, ep_size=2) == (66 * top_k, 2 * experts)
    assert rows_of_block(slots.blocks[0], tokens=66, ep_size=2) == (2 * 66 * top_k, 0)


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        (MODELS["scmoe"], [2]),
        (MODELS["dgmoe"], [2]),
        (MODELS["dgmoe_share"], [4]),
        ("moe.architecture=dgmoe_share model.layers=6", [4, 2]),
        (MODELS["dense"], []),
    ],
)
def test_copies_of_a_token_over_all_uses_of_a_module(words, copies):
    assert list(routed_copies(build_model_on_meta(tiny(*words.split()))).values()) == copies


def test_zero_experts_halve_what_is_sent_and_computed_where_they_are_as_many_as_experts():
    """2 experts a token of 6 are 4 active ones with 12 ids: the gate is twice as large, a bias
    costs nothing."""
    words = ("moe.router=longcat", "moe.top_k=4", "moe.capacity_factor=null", "model.layers=2")
    plain, halved = (
        build_model_on_meta(tiny(*words, f"moe.zero_experts={zero}")) for zero in (0, 6)
    )
    (all_bytes,), half = transfer_bytes(plain, "32-true"), transfer_bytes(halved, "32-true")
    assert half == [all_bytes / 2]
    flops, less = forward_flops(plain, 12), forward_flops(halved, 12)
    assert (less["experts"], less["gate"]) == (flops["experts"] / 2, 2 * flops["gate"])
    (_, experts, active), (_, _, fewer) = (
        count_parameters(model)["experts"] for model in (plain, halved)
    )
    assert (active, fewer) == (experts * 4 // 6, experts * 2 // 6)


def test_flops_of_pictures_are_what_torch_counts():
    """Maps shrink from stage to stage; we do not count the attention's position bias, computed once
    per batch."""
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    words = (
        "model.family=swin model.dim=16 model.heads=2 model.layers=4 model.patch_size=2"
        " model.window=4"
    )
    words += " data.name=digits data.image_size=32 data.num_classes=10"
    words += " moe.num_experts=4 moe.capacity_factor=null moe.architecture=dgmoe"
    model = build_model(load_config(None, words.split()))
    attentions = [module for module in model.modules() if hasattr(module, "cpb_mlp")]
    bias = sum(
        attention.relative_coords_table.numel() * weight.numel()
        for attention in attentions
        for weight in attention.cpb_mlp.parameters()
        if weight.dim() > 1
    )
    ours = sum(forward_flops(model, 0).values()) + bias / BATCH
    assert ours == counted(model, torch.randn(BATCH, 3, 32, 32), backward=False)
