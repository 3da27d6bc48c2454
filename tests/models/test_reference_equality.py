"""Every architecture equals the oracle in logits, losses and all gradients; slots and chunks change
nothing.

The tolerance is 1e-12 of the largest entry in float64: both sides do the same sums in another
order, over at most a few thousand terms of rounding error 1e-16 each. A wrong term changes the
result by 1e-3 or more.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from scmoe.config.fields import Config
from scmoe.moe.balance import integer_sums, load_balance_loss, router_z_loss
from tests import reference
from tests.support.architectures import (
    KINDS,
    LANGUAGE_WITH_ORACLE,
    LATENT_ATTENTION,
    overrides,
    with_marks,
)
from tests.support.models import assert_close, gradients, tiny, tiny_batch, tiny_model

LLAMA = ("model.family=llama", "model.heads=4", "model.kv_heads=2")


def config_of(words: str, *further: str) -> Config:
    return tiny(*overrides(words), *further)


def run(
    config: Config,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list, torch.nn.Module]:
    """Return values by name, gradients by name of the weighted sum of losses, the routers' sums,
    and the model."""
    model, (ids, labels) = tiny_model(config), tiny_batch(config)
    logits, stats = model(ids)
    values = {
        "logits": logits,
        "token_loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
    }
    if stats:
        sums = integer_sums(stats)
        values |= {
            "load_balance_loss": load_balance_loss(stats, sums),
            "z_loss": router_z_loss(stats, sums),
        }
    total(values).backward()
    return {name: value.detach() for name, value in values.items()}, gradients(model), stats, model


def total(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The routers' losses have large weights, so that an error in them is visible."""
    return (
        values["token_loss"]
        + 0.5 * values.get("load_balance_loss", 0)
        + 0.3 * values.get("z_loss", 0)
    )


def oracle(config: Config, model: torch.nn.Module) -> tuple[dict, dict, reference.Answer]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    moe = config.moe
    spec = reference.Spec(
        moe.architecture,
        config.model.layers,
        config.model.heads,
        moe.num_experts,
        moe.top_k,
        moe.position,
        moe.first_position,
        moe.combine,
        moe.coefficient_input,
        moe.tap_norm,
        moe.every,
        moe.capacity_factor,
        moe.router,
        moe.router_scale,
        tuple(moe.leading_dense),
        config.model.latent.scaled,
        config.model.rope_theta,
        config.model.latent.yarn_factor,
        moe.distinct_experts,
    )
    answer = reference.gpt(weights, spec, *tiny_batch(config))
    values = {
        name: getattr(answer, name)
        for name in ("logits", "token_loss", "load_balance_loss", "z_loss")
    }
    values = {name: value for name, value in values.items() if value is not None}
    total(values).backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return values, {name: weights[name].grad for name in trained}, answer


def check_against_oracle(config: Config) -> reference.Answer:
    values, grads, stats, model = run(config)
    expected_values, expected_grads, answer = oracle(config, model)
    assert values.keys() == expected_values.keys() and grads.keys() == expected_grads.keys()
    for name, expected in (expected_values | expected_grads).items():
        assert_close((values | grads)[name], expected.detach(), 1e-12, name)
    assert [s.num_dropped.item() for s in stats] == answer.dropped
    assert [s.counts_E.tolist() for s in stats] == answer.copies
    return answer


@pytest.mark.parametrize(
    ("architecture", "capacity"),
    [(name, capacity) for name in LANGUAGE_WITH_ORACLE for capacity in ("null", "1.0")]
    + [(n, "2.0") for n in KINDS],
)
def test_architecture_equals_oracle(architecture, capacity):
    answer = check_against_oracle(
        config_of(LANGUAGE_WITH_ORACLE[architecture], f"moe.capacity_factor={capacity}")
    )
    if capacity == "null":
        assert sum(answer.dropped) == 0
    if capacity == "1.0":  # without drops the case would not test them
        assert sum(answer.dropped) > 0


ROUTERS = {
    "deepseek": "architecture=shared_expert router=deepseek top_k=3 router_scale=2.5",
    "deepseek-top-1": "architecture=top_k router=deepseek",
    "longcat": (
        "router=longcat top_k=3 router_scale=6 zero_experts=3 tap_norm=shared combine=direct_add"
    ),
    "longcat-dgmoe": "architecture=dgmoe router=longcat zero_experts=2",
    "softmax-with-bias-and-zero-experts": "position=pos1 top_k=2 bias_rate=0.1 zero_experts=2",
    "deepseek-with-zero-experts": (
        "architecture=top_k every=1 top_k=2 router=deepseek zero_experts=2"
    ),
    "deepseek-with-zero-experts-at-pos2": (
        "position=pos2 top_k=3 router=deepseek router_scale=2.5 zero_experts=3"
    ),
    "farskip-after-a-dense-block": (
        "architecture=farskip every=1 top_k=2 leading_dense=[56] model.layers=3"
    ),
    "widths-and-leading-dense-blocks": (
        "architecture=dgmoe_share ffn_dim=40 leading_dense=[56,8] model.layers=6"
    ),
}


@pytest.mark.parametrize("capacity", ("null", "1.0"))
@pytest.mark.parametrize("router", ROUTERS)
def test_router_equals_oracle(router, capacity):
    """randomise gives the selection biases values that change choices, for experts and zero
    experts."""
    config = config_of(ROUTERS[router], f"moe.capacity_factor={capacity}")
    answer = check_against_oracle(config)
    gates = 2 if "dgmoe" in config.moe.architecture else 1
    all_copies = 24 * config.moe.top_k * gates * len(answer.copies)
    assert (sum(map(sum, answer.copies)) < all_copies) == (config.moe.zero_experts > 0)
    assert (sum(answer.dropped) > 0) == (capacity == "1.0")


@pytest.mark.parametrize("architecture", with_marks(LANGUAGE_WITH_ORACLE))
def test_architecture_of_llama_equals_oracle(architecture):
    check_against_oracle(
        config_of(LANGUAGE_WITH_ORACLE[architecture], "moe.capacity_factor=null", *LLAMA)
    )


@pytest.mark.parametrize("architecture", LATENT_ATTENTION)
def test_latent_attention_equals_oracle(architecture):
    words = LATENT_ATTENTION[architecture]
    check_against_oracle(config_of(words, "model.family=llama", "moe.capacity_factor=null"))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param((), id="gpt"),
        pytest.param(LLAMA, id="llama"),
        pytest.param(("model.kv_heads=1",), id="gpt-one-kv-head"),
        pytest.param(("model.heads=3", "model.head_dim=5"), id="gpt-heads-that-do-not-divide"),
        pytest.param((*LLAMA, "model.head_dim=14"), id="llama-wide-heads"),
    ],
)
def test_dense_equals_oracle(family):
    check_against_oracle(tiny("moe.architecture=dense", *family))


SCHEDULED = {  # case: (words, last slot, slots before an attention)
    "shared_expert": ("architecture=shared_expert top_k=2", 1, ()),
    "pos1": ("position=pos1 top_k=2", 2, (0,)),
    "pos2": ("position=pos2 top_k=2", 3, (1,)),
    "pos3": ("position=pos3 top_k=2", 4, (0, 2)),
    "every-block": ("position=pos1 every=1", 2, (0,)),
    "pos2-every-block": (
        "position=pos2 every=1 top_k=2",
        1,
        (),
    ),  # the first block's, which has no attention
    "farskip": (LANGUAGE_WITH_ORACLE["farskip"], 2, (0,)),
    "instella": (f"{LATENT_ATTENTION['instella']} model.family=llama", 2, (0,)),
    "dgmoe": ("architecture=dgmoe position=pos3", 3, (0, 2)),
    "dgmoe-share": ("architecture=dgmoe_share position=pos2 model.layers=4", 2, (1,)),
}


@pytest.mark.parametrize("capacity", ("null", "1.0"))
@pytest.mark.parametrize("case", SCHEDULED)
def test_schedule_changes_no_bit_over_slots_and_rounding_over_chunks(case, capacity):
    text, last_slot, attentions = SCHEDULED[case]
    config = config_of(text, f"moe.capacity_factor={capacity}")

    def outcome(slot: int, chunks: int, inside: bool = False) -> dict[str, torch.Tensor]:
        schedule = replace(config.schedule, slot=slot, chunks=chunks, inside_attention=inside)
        values, grads, _, _ = run(replace(config, schedule=schedule))
        return values | grads

    whole = outcome(0, 1)
    for chunks in (1, 3):
        first = whole if chunks == 1 else outcome(0, chunks)
        for name, value in first.items():
            # chunks split the sums over an expert's tokens and may change their rounding; slots may
            # not
            assert_close(value, whole[name], 1e-12, f"{name}, chunks {chunks}")
        others = [(slot, False) for slot in range(1, last_slot + 1)] + [
            (slot, True) for slot in attentions
        ]
        for slot, inside in others:
            other = outcome(slot, chunks, inside)
            assert all(torch.equal(other[name], value) for name, value in first.items()), (
                slot,
                inside,
                chunks,
            )


@pytest.mark.parametrize(
    "architecture", ("top-2", "shared-cg2", "pos1", "pos2", "pos3", "scmoe-every-block", "dgmoe")
)
def test_padding_changes_no_logit(architecture):
    """The mask reaches every router: 4 tokens of padding after 8 real ones change none of their
    logits or counts."""
    config = config_of(LANGUAGE_WITH_ORACLE[architecture], "moe.capacity_factor=null")
    model, (ids, _) = tiny_model(config), tiny_batch(config, 1)
    logits, stats = model(ids, torch.arange(12)[None] < 8)
    short_logits, short_stats = model(ids[:, :8])
    assert_close(logits[:, :8], short_logits, 1e-12)
    assert torch.equal(integer_sums(stats), integer_sums(short_stats))


# Negative control: the comparison detects an oracle with one wrong term.


@pytest.mark.parametrize(
    "change",
    [
        {"position": "pos1"},
        {"position": "pos3"},
        {"combine": "direct_add"},
        {"coefficient_input": "tap"},
        {"tap_norm": "shared"},
        {"top_k": 1},
        {"capacity_factor": 1.0},
        {"router": "softmax"},
        {"router_scale": 1.0},
    ],
    ids=str,
)
def test_a_wrong_oracle_is_detected(change, monkeypatch):
    honest = reference.gpt
    monkeypatch.setattr(
        reference, "gpt", lambda w, spec, *batch: honest(w, spec._replace(**change), *batch)
    )
    words = f"{ROUTERS['deepseek-with-zero-experts-at-pos2']} combine=cg2"
    with pytest.raises(AssertionError, match="differs"):
        check_against_oracle(config_of(words, "moe.capacity_factor=null"))


def test_an_oracle_without_dgmoes_rule_is_detected(monkeypatch):
    honest = reference.gate
    monkeypatch.setattr(
        reference, "gate", lambda logits, top_k, taken, *how: honest(logits, top_k, None, *how)
    )
    with pytest.raises(AssertionError, match="differs"):
        check_against_oracle(config_of("architecture=dgmoe", "moe.capacity_factor=null"))


def test_a_model_that_shares_no_module_is_detected():
    config = config_of(LANGUAGE_WITH_ORACLE["dgmoe-share"], "moe.capacity_factor=null")
    model = tiny_model(
        config_of("architecture=dgmoe position=pos2 model.layers=4", "moe.capacity_factor=null")
    )
    expected, _, _ = oracle(config, model)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(model(tiny_batch(config)[0]).logits_BSV, expected["logits"], 1e-12, "logits")
