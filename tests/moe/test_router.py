"""The gate (Eq. 2-5) equals the oracle, and its switches have their effects."""

from typing import Any

import pytest
import torch

from scmoe.moe.router import Router, Scoring, round_robin
from tests import reference
from tests.support.models import DIM, EXPERTS, assert_close, randomise


def router(top_k: int = 2, dtype: torch.dtype = torch.float64, **switches: Any) -> Router:
    return randomise(Router(DIM, EXPERTS, top_k, **switches).to(dtype))


def tokens(num_tokens: int = 20, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize("top_k", (1, 2, 3, EXPERTS))
def test_equals_the_oracle(top_k):
    gate, x = router(top_k), tokens()
    routing = gate(x)
    for t, token in enumerate(x):
        logits = token @ gate.gate.weight.T
        chosen, weights = reference.gate(logits, top_k)
        assert routing.topk_ids_TK[t].tolist() == chosen
        assert_close(routing.topk_weights_TK[t], torch.stack(weights))
        assert_close(routing.logits_TE[t], logits)
        assert_close(routing.scores_TE[t], logits.softmax(0))


@pytest.mark.parametrize("top_k", (2, 3, EXPERTS))
def test_weights_without_renormalisation_are_probabilities_over_all_experts(top_k):
    routing = router(top_k, scoring=Scoring(normalise=False))(tokens())
    assert torch.equal(routing.topk_ids_TK, router(top_k)(tokens()).topk_ids_TK)
    assert_close(
        routing.topk_weights_TK, routing.logits_TE.softmax(-1).gather(-1, routing.topk_ids_TK)
    )


@pytest.mark.parametrize("parameters", (torch.float32, torch.bfloat16))  # bf16-mixed, bf16-true
@pytest.mark.parametrize("top_k", (1, 2))
def test_bf16_never_reaches_the_logits(top_k, parameters):
    gate, x = router(top_k, parameters), tokens(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    assert {t.dtype for t in (routing.logits_TE, routing.scores_TE, routing.topk_weights_TK)} == {
        torch.float32
    }
    # float32 products of the same numbers; bf16 would have an error of 4e-3
    assert_close(routing.logits_TE.double(), x.double() @ gate.gate.weight.double().T, 1e-6)


def test_huge_logits_stay_finite_under_bf16_autocast():
    """Fault 28: logits of +-7e4 overflow float16, and bf16 rounds them to multiples of 256."""
    gate = Router(DIM, EXPERTS, 2)
    x = torch.zeros(3, DIM)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0])
    with torch.no_grad():
        gate.gate.weight.zero_()
        gate.gate.weight[:, 0] = torch.tensor([7e4, -7e4, 7e4 - 1, 0, 6.9e4, -6.9e4])
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    assert routing.topk_ids_TK.tolist() == [[0, 2], [1, 5], [0, 2]]
    expected = torch.tensor([1.0, 0.0]).sigmoid()[0]  # two logits that differ by 1 are not tied
    assert_close(routing.topk_weights_TK[0], torch.stack([expected, 1 - expected]), 1e-6)
    total = (
        routing.topk_weights_TK.sum()
        + routing.scores_TE.square().sum()
        + routing.logits_TE.logsumexp(-1).sum()
    )
    total.backward()
    assert all(t.isfinite().all() for t in routing[1:])
    assert gate.gate.weight.grad.isfinite().all()


def test_noise_is_that_of_eq_4_and_only_in_training():
    gate, x = router(noisy=True), tokens()
    torch.manual_seed(5)
    normal = torch.randn(len(x), EXPERTS, dtype=torch.float64)
    torch.manual_seed(5)
    noisy = gate.train()(x)
    assert_close(
        noisy.logits_TE, reference.noisy_logits(x, gate.gate.weight, gate.noise.weight, normal)
    )
    assert (noisy.logits_TE - x @ gate.gate.weight.T).abs().min() > 1e-6
    noisy.logits_TE.sum().backward()
    assert gate.noise.weight.grad.abs().max() > 0

    state = torch.get_rng_state()
    quiet = gate.eval()(x)
    assert_close(quiet.logits_TE, x @ gate.gate.weight.T)
    assert torch.equal(torch.get_rng_state(), state)  # no noise is drawn
    assert router().noise is None


def test_hooks_of_the_gate_and_of_the_noise_have_effect():
    """Programs that keep weights elsewhere, and adapters, act where a module is called."""
    gate, x = router(noisy=True), tokens()
    for linear in (gate.gate, gate.noise):
        torch.manual_seed(0)
        expected = gate(x).logits_TE
        weight, linear.weight.data = linear.weight.data, torch.zeros_like(linear.weight)

        def bring_weight(module: Any, inputs: Any, weight: torch.Tensor = weight) -> None:
            module.weight.data = weight

        handle = linear.register_forward_pre_hook(bring_weight)
        torch.manual_seed(0)
        assert torch.equal(gate(x).logits_TE, expected)
        handle.remove()


@pytest.mark.parametrize("num_tokens", (1, 5, 24))
@pytest.mark.parametrize("top_k", (1, 2, 5))
def test_balanced_routing_is_even_to_one_copy(top_k, num_tokens):
    routing = router(top_k, deal=round_robin(EXPERTS, top_k))(tokens(num_tokens))
    counts = torch.bincount(routing.topk_ids_TK.flatten(), minlength=EXPERTS)
    assert counts.sum() == num_tokens * top_k and counts.max() - counts.min() <= 1
    assert all(len(set(row)) == top_k for row in routing.topk_ids_TK.tolist())
    scores = routing.scores_TE.gather(1, routing.topk_ids_TK)
    assert_close(
        routing.topk_weights_TK, scores / scores.sum(1, keepdim=True) if top_k > 1 else scores
    )


@pytest.mark.parametrize("deal", (None, round_robin(EXPERTS, 2)))
def test_padding_is_routed_nowhere(deal):
    mask = torch.arange(20) % 3 > 0
    routing = router(deal=deal)(tokens(), mask)
    assert (routing.topk_ids_TK[~mask] == EXPERTS).all() and (
        routing.topk_weights_TK[~mask] == 0
    ).all()
    assert (routing.topk_ids_TK[mask] < EXPERTS).all() and (routing.topk_weights_TK[mask] > 0).all()


@pytest.mark.parametrize("top_k", (0, EXPERTS + 1))
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, allowed: 1..num_experts"):
        Router(DIM, EXPERTS, top_k)
