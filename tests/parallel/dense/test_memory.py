"""A rank's weights, gradients and moments have exactly the bytes of a real tiny model; activations
are bounded."""

import pytest
import torch
import torch.nn.functional as F

from scmoe.config.load import load_config
from scmoe.parallel.dense.memory import RankJob, Split, activations, gathered, rank_memory
from scmoe.training.assembly.model import (
    build_model,
    build_model_on_meta,
    build_module,
    updated_by_muon,
)
from scmoe.training.assembly.rank_job import rank_job
from tests.support.models import kept_for_backward, one_of_two, tiny
from tests.support.two_batches import run_batches

DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "words",
    ["moe.architecture=scmoe", "optim.name=muon", "moe.architecture=dgmoe_share model.layers=4"],
)
def test_state_has_exactly_the_bytes_of_a_real_rank(words, precision):
    config = tiny(*words.split())
    with one_of_two() as wire:
        model = build_model(config, wire).to(DTYPES[precision])
    module = build_module(config)
    module.model = model
    optimizer = module.configure_optimizers()["optimizer"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    parameters = list(model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values()]

    whole, job = (
        build_model_on_meta(config),
        RankJob(ranks=2, ep_size=2, seq_len=12, precision=precision),
    )
    memory = rank_memory(whole, job, updated_by_muon(config, whole))
    held = {"weights": parameters, "gradients": [p.grad for p in parameters], "optimizer": moments}
    assert {key: memory[key] for key in held} == {
        key: sum(t.nbytes for t in own) for key, own in held.items()
    }
    # a batch after the first one begins with all gradients
    assert memory["total"] >= sum(memory[key] for key in (*held, "activations"))


def test_frozen_weights_are_split_as_trained_ones_are():
    model = build_model_on_meta(tiny("moe.architecture=scmoe"))
    job = RankJob(ranks=4, ep_size=2, seq_len=12, dense="sharded")
    trained = rank_memory(model, job)["weights"]
    model.blocks.requires_grad_(False)
    assert rank_memory(model, job)["weights"] == trained


WIDE = (
    *("model.dim=128", "model.heads=4", "model.layers=4", "moe.num_experts=8"),
    *("data.name=synthetic", "data.vocab_size=512", "data.seq_len=64"),
)
LATENT_WIDE = (
    "model.attention=latent model.latent.kv_rank=64 model.latent.nope_dim=24"
    " model.latent.rope_dim=8 model.latent.value_dim=32"
)
CASES = {
    "dense": "moe.architecture=dense",
    "top-2": "moe.architecture=top_k moe.top_k=2",
    "scmoe": "moe.architecture=scmoe model.dropout=0.1",
    "scmoe-shared-norm": "moe.architecture=scmoe moe.combine=cg2 moe.tap_norm=shared",
    "dgmoe": "moe.architecture=dgmoe",
    "dropless": "moe.architecture=shared_expert moe.capacity_factor=null",
    "farskip": "moe.architecture=farskip moe.every=1 model.dropout=0.1",
    "pos2-every-block": "moe.every=1 moe.after_norm=true",
    "latent": f"model.family=llama moe.every=1 {LATENT_WIDE}",
    "latent-gated": (
        f"model.family=llama moe.architecture=dense {LATENT_WIDE} model.latent.q_rank=48 "
        "model.latent.scaled=true model.latent.gated=true"
    ),
    "llama": "model.family=llama model.kv_heads=2 model.head_dim=24 moe.every=1 moe.position=pos1",
    "swin": "model.dim=48 model.layers=4 model.window=6 data.image_size=96 data.num_classes=10",
}


@pytest.mark.parametrize(
    ("precision", "recompute"), [("32-true", False), ("32-true", True), ("bf16-mixed", False)]
)
@pytest.mark.parametrize("case", CASES)
def test_the_bound_on_activations_is_not_below_what_autograd_keeps_and_not_far_above(
    case, precision, recompute
):
    preset, words = None, [*WIDE, *CASES[case].split(), f"trainer.recompute={recompute}"]
    batch = torch.randint(512, (2, 64))
    if case == "swin":
        pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
        preset, words = "configs/model/swinv2_moe_s.yaml", words[len(WIDE) :]
        batch = torch.randn(8, 3, 96, 96)
    model = build_model(load_config(preset, words))
    with (
        kept_for_backward(model) as kept,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        logits = model(batch)[0].float().flatten(0, -2)
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    job = RankJob(
        samples=len(batch), seq_len=64, precision=precision, recompute=recompute, on_gpu=False
    )
    at_loss, _ = activations(model, job)
    # two copies of the logits are gradients
    bound = at_loss - 2 * logits.nbytes + gathered(Split(model, job))[0]
    assert 0.95 < bound / sum(kept.values()) < 1.3


@pytest.mark.parametrize("words", ["schedule.chunks=2", "moe.architecture=dgmoe"])
def test_each_half_of_two_batches_in_flight_has_its_bfloat16_copies_of_the_experts(words):
    model = build_model(load_config(None, [*WIDE, words, "moe.capacity_factor=null"]))
    batch = torch.randint(512, (2, 64))
    bounds, kept_bytes = [], []
    for batches in (1, 2):
        run_batches(model, batches)
        with kept_for_backward(model) as kept, torch.autocast("cpu", torch.bfloat16):
            model(batch)
        kept_bytes.append(sum(kept.values()))
        job = RankJob(samples=2, seq_len=64, precision="bf16-mixed", on_gpu=False, parts=batches)
        bounds.append(gathered(Split(model, job))[0])
    more = kept_bytes[1] - kept_bytes[0]
    assert more > 0 and bounds[1] - bounds[0] == pytest.approx(more, rel=0.02)


def test_a_job_has_two_batches_in_flight_where_they_may_be_chosen():
    ranks = ("trainer.devices=2", "moe.capacity_factor=null")
    for words, batches in (
        ("schedule.batches_in_flight=2", 2),
        ("schedule.auto=true", 2),
        ("schedule.auto=true analysis.gating_every=10", 1),  # a probe reads whole batches
        ("schedule.auto=true schedule.batches_in_flight=1", 1),
        ("schedule.chunks=2", 1),
    ):
        assert rank_job(load_config(None, [*WIDE, *ranks, *words.split()])).parts == batches
