"""Activation checkpointing changes no bit, keeps fewer bytes, and routes once."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from scmoe.config.load import load
from scmoe.moe.router import Router
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model
from tests.support.models import tiny, tiny_batch, tiny_model

TINY = "model.dim=32 model.heads=2 model.layers=4 moe.num_experts=4 moe.top_k=2 moe.noisy=true model.dropout=0.1"
INSIDE = "schedule.inside_attention=true"
ARCHITECTURES = (
    *("top_k", "shared_expert", "scmoe", f"scmoe {INSIDE}"),
    *(f"farskip moe.every=1 model.layers=2{words}" for words in ("", f" {INSIDE}")),
)
SIZES = "data.name=synthetic data.vocab_size=64 data.seq_len=16"


def step(architecture, recompute, monkeypatch):
    """Returns the logits with all gradients, the bytes kept for backward, and the number of router calls."""
    overrides = [
        *TINY.split(),
        *SIZES.split(),
        *f"moe.architecture={architecture}".split(),
        f"trainer.recompute={recompute}",
    ]
    model = build_model(load(None, overrides), ParallelContext()).double()
    routed, forward, kept = [], Router.forward, {}

    def counting(self, *arguments):
        routed.append(1)
        return forward(self, *arguments)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(Router, "forward", counting)
        torch.manual_seed(3)
        ids = torch.randint(64, (4, 16))
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(ids).logits_BSV
        logits.square().sum().backward()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in parameters)
    return [logits, *(p.grad for p in model.parameters())], activations, len(routed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_changes_no_bit_and_keeps_less(architecture, monkeypatch):
    plain, kept, routed = step(architecture, False, monkeypatch)
    again, kept_again, routed_again = step(architecture, True, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), "dropout and noise included"
    assert kept_again < 0.6 * kept
    assert routed == routed_again == 2, "the routing is kept and not recomputed"


@pytest.mark.parametrize("copied", (deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("copy", "pickle"))
def test_a_copy_computes_with_its_own_weights(copied):
    config = tiny("trainer.recompute=true", INSIDE)
    model, (ids, _) = tiny_model(config), tiny_batch(config)
    copy, before = copied(model), model(ids).logits_BSV
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copy(ids).logits_BSV, before)
