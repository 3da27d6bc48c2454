"""Activation checkpointing changes no bit, keeps fewer bytes, and routes once."""

import pickle
from copy import deepcopy

import pytest
import torch

from scmoe.moe.router import Router
from tests.support.models import kept_for_backward, tiny, tiny_batch, tiny_model

INSIDE = "schedule.inside_attention=true"
ARCHITECTURES = (
    *("top_k", "shared_expert", "scmoe", f"scmoe {INSIDE}"),
    *(f"farskip moe.every=1 model.layers=2{words}" for words in ("", f" {INSIDE}")),
)


def step(architecture, recompute):
    """Return the logits with all gradients, the bytes kept for backward, and the number of router
    calls."""
    words = (
        "model.layers=4 moe.top_k=2 moe.noisy=true model.dropout=0.1"
        f" moe.architecture={architecture}"
    )
    config = tiny(*words.split(), f"trainer.recompute={recompute}")
    model, (ids, _) = tiny_model(config), tiny_batch(config)
    routed = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *_: routed.append(1))
    torch.manual_seed(3)
    with kept_for_backward(model) as kept:
        logits = model(ids).logits_BSV
    logits.square().sum().backward()
    return [logits, *(p.grad for p in model.parameters())], sum(kept.values()), len(routed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_changes_no_bit_and_keeps_less(architecture):
    plain, kept, routed = step(architecture, False)
    again, kept_again, routed_again = step(architecture, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), (
        "dropout and noise included"
    )
    assert kept_again < 0.6 * kept
    assert routed == routed_again == 2, "the routing is kept and not recomputed"


@pytest.mark.parametrize(
    "copied", (deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("copy", "pickle")
)
def test_a_copy_computes_with_its_own_weights(copied):
    config = tiny("trainer.recompute=true", INSIDE)
    model, (ids, _) = tiny_model(config), tiny_batch(config)
    copy, before = copied(model), model(ids).logits_BSV
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copy(ids).logits_BSV, before)
