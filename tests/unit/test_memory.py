"""A rank's weights, gradients and moments have exactly the bytes of a real tiny model; activations are close."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.footprint.memory import activations, rank_memory
from scmoe.footprint.split import Split
from scmoe.footprint.stages import stages
from scmoe.footprint.step_memory import narrow_copies
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model, build_model_on_meta, build_module, updated_by_muon
from tests.support.models import OneOfTwo, tiny

DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "words", ["moe.architecture=scmoe", "optim.name=muon", "moe.architecture=dgmoe_share model.layers=4"]
)
def test_state_has_exactly_the_bytes_of_a_real_rank(words, precision):
    config = tiny(*words.split())
    model = build_model(config, OneOfTwo(rank=1, world_size=2, ep_size=2)).to(DTYPES[precision])
    module = build_module(config)
    module.model = model
    optimizer = module.configure_optimizers()["optimizer"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    parameters = list(model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values()]

    whole = build_model_on_meta(config)
    common = {"seq_len": 12, "samples": 1, "precision": precision, "ep_size": 2, "recompute": False, "on_gpu": True}
    memory = rank_memory(whole, dp_size=1, by_muon=updated_by_muon(config, whole), **common)
    assert memory["weights"] == sum(p.nbytes for p in parameters)
    assert memory["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert memory["optimizer"] == sum(t.nbytes for t in moments)
    assert memory["total"] > memory["weights"] + memory["gradients"] + memory["optimizer"]


@pytest.mark.parametrize("dense", ["replicated", "sharded"])
def test_a_batch_after_the_first_begins_with_gradients(dense):
    """At the loss there are the gradients of earlier batches, beside all activations."""
    model = build_model_on_meta(tiny("data.seq_len=64", "moe.num_experts=8"))
    common = {"seq_len": 64, "samples": 4, "precision": "32-true", "ep_size": 2, "dp_size": 2, "recompute": False}
    once, many = (rank_memory(model, **common, on_gpu=True, dense=dense, accumulate=n) for n in (1, 4))
    assert {key for key in once if once[key] != many[key]} <= {"total"} and many["total"] > once["total"]
    if dense == "replicated":
        sizes = (many[key] for key in ("weights", "gradients", "optimizer", "activations"))
        assert many["total"] >= sum(sizes)


# ---------------------------------------------------------------------- activations

WIDE = (
    *("model.dim=128", "model.heads=4", "model.layers=4", "moe.num_experts=8"),
    *("data.name=synthetic", "data.vocab_size=512", "data.seq_len=64"),
)
SAMPLES = 2
CASES = {
    "dense": "moe.architecture=dense",
    "top-2": "moe.architecture=top_k moe.top_k=2",
    "scmoe": "moe.architecture=scmoe model.dropout=0.1",
    "scmoe-shared-norm": "moe.architecture=scmoe moe.combine=cg2 moe.tap_norm=shared",
    "dgmoe": "moe.architecture=dgmoe",
    "dropless": "moe.architecture=shared_expert moe.capacity_factor=null",
    "llama": "model.family=llama model.kv_heads=2 moe.every=1 moe.position=pos1",
}


def kept_for_backward(config: Config, precision: str) -> tuple[int, nn.Module]:
    """Returns the bytes that autograd keeps (each storage once, no weights), and the model."""
    model = build_model(config, ParallelContext()).to(DTYPES[precision])
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.randint(config.data.vocab_size, (SAMPLES, config.data.seq_len))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with saved_tensors_hooks(keep, lambda t: t), mixed:
        logits = model(ids).logits_BSV
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        F.cross_entropy(wide.flatten(0, 1), ids.flatten())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for storage, size in kept.items() if storage not in weights), model


@pytest.mark.parametrize("recompute", (False, True), ids=("kept", "recomputed"))
@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed"))
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_of_activations_is_within_a_tenth_of_what_autograd_keeps(case, precision, recompute):
    config = load(None, [*WIDE, *CASES[case].split(), f"trainer.recompute={recompute}"])
    measured, model = kept_for_backward(config, precision)
    kept, recomputed = activations(model, 64, precision, recompute, on_gpu=False)
    split = Split(model, "replicated", 1, 1, 1, precision)
    copies = sum(narrow_copies(split, stage, recompute) for stage in stages(model, 64, precision, False))
    estimate = SAMPLES * kept + copies
    assert abs(estimate / measured - 1) < 0.1
    assert (recomputed > 0) == recompute


@pytest.mark.parametrize("recompute", (False, True), ids=("kept", "recomputed"))
def test_the_estimate_holds_for_pictures(recompute):
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    words = ["model.dim=48", "model.layers=4", "model.window=6", "data.image_size=96", "data.num_classes=10"]
    config = load("configs/model/swinv2_moe_s.yaml", [*words, f"trainer.recompute={recompute}"])
    model = build_model(config, ParallelContext())
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(4, 3, 96, 96))
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    measured = sum(size for storage, size in kept.items() if storage not in constant)
    estimate, _ = activations(model, 0, "32-true", recompute, on_gpu=False)
    assert abs(4 * estimate / measured - 1) < 0.1  # the estimate lacks the position bias, kept once per batch


def test_recomputing_keeps_less_and_recomputes_one_part_at_a_time():
    model = build_model_on_meta(load(None, [*WIDE, "model.layers=8"]))
    whole, nothing = activations(model, 64, "32-true", recompute=False)
    kept, recomputed = activations(model, 64, "32-true", recompute=True)
    assert nothing == 0.0
    assert kept + recomputed < 0.6 * whole
