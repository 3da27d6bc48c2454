"""The routers' sums and losses have known values and do not depend on how the tokens are split over
ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scmoe.moe.balance import (
    integer_sums,
    load_balance_loss,
    load_max,
    load_metrics,
    over_steps,
    router_stats,
    router_z_loss,
    step_load,
)
from scmoe.moe.layout import arrange_filled, arrange_slots
from scmoe.moe.tokens import RouterStats, Routing
from tests.support.models import assert_close

EXPERTS = 4


def stats_of(
    logits_TE: Tensor, top_k: int = 1, capacity: int | None = None, mask_T: Tensor | None = None
) -> RouterStats:
    scores_TE = logits_TE.softmax(-1)
    ids_TK = logits_TE.topk(top_k).indices
    if mask_T is not None:
        ids_TK = ids_TK.where(mask_T[:, None], EXPERTS)
    layout = (
        arrange_filled(ids_TK, EXPERTS)
        if capacity is None
        else arrange_slots(ids_TK, EXPERTS, capacity)
    )
    routing = Routing(ids_TK, scores_TE.gather(1, ids_TK % EXPERTS), scores_TE, logits_TE)
    return router_stats(routing, layout, mask_T, EXPERTS)


def losses(stats: list[RouterStats]) -> tuple[Tensor, Tensor]:
    sums = integer_sums(stats)
    return load_balance_loss(stats, sums), router_z_loss(stats, sums)


def random_logits(num_tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(
        num_tokens, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_losses_of_an_even_load_a_collapsed_router_and_equal_logits():
    """The logsumexp of E equal logits x is x + log E."""
    even = torch.eye(EXPERTS, dtype=torch.float64).repeat(3, 1) * 5
    collapsed = torch.zeros(12, EXPERTS, dtype=torch.float64)
    collapsed[:, 2] = 1e3
    assert losses([stats_of(even)])[0].item() == pytest.approx(1.0, abs=1e-12)
    assert losses([stats_of(collapsed)])[0].item() == pytest.approx(EXPERTS, abs=1e-12)
    equal = losses([stats_of(torch.full((5, EXPERTS), 2.0, dtype=torch.float64))])[1]
    assert equal.item() == pytest.approx((2 + math.log(EXPERTS)) ** 2, abs=1e-12)


@given(st.data(), st.integers(1, 4), st.sampled_from((1, 2)), st.booleans())
def test_mean_over_ranks_is_the_loss_of_the_global_batch(data, world_size, top_k, padded):
    """Fault 24, without processes: each rank has its tokens; the integer sums are added, the
    gradients averaged.

    Ranks may hold different numbers of tokens, and padding. The tolerance is 1e-12: the sums have
    another order.
    """
    num_tokens = data.draw(st.lists(st.integers(1, 5), min_size=world_size, max_size=world_size))
    layers = [random_logits(sum(num_tokens), seed).requires_grad_() for seed in (0, 1)]
    mask = (
        torch.arange(sum(num_tokens)) % 3 != 1
        if padded
        else torch.ones(sum(num_tokens), dtype=torch.bool)
    )

    whole = sum(losses([stats_of(layer, top_k, mask_T=mask) for layer in layers]))
    whole_grads = torch.autograd.grad(whole, layers)

    masks = mask.split(num_tokens)
    split = zip(*(layer.split(num_tokens) for layer in layers), strict=True)
    ranks = [
        [stats_of(t, top_k, mask_T=m) for t in tensors]
        for tensors, m in zip(split, masks, strict=True)
    ]
    sums = sum(integer_sums(stats) for stats in ranks)
    mean = (
        sum(
            load_balance_loss(s, sums, world_size) + router_z_loss(s, sums, world_size)
            for s in ranks
        )
        / world_size
    )
    assert_close(mean, whole)
    for grad, expected in zip(torch.autograd.grad(mean, layers), whole_grads, strict=True):
        assert_close(grad, expected)


def test_losses_of_ranks_without_summing_differ():
    """Negative control: the mean of per-rank losses with per-rank f differs from the loss of all
    tokens."""
    logits = random_logits()
    parts = [losses([stats_of(part)])[0] for part in logits.split(6)]
    assert (sum(parts) / 2 - losses([stats_of(logits)])[0]).abs() > 1e-4


@pytest.mark.parametrize("capacity", (None, 2))
def test_padding_is_left_out_of_every_sum(capacity):
    logits, mask = random_logits(), torch.arange(12) % 4 > 0
    padded, real = stats_of(logits, 2, capacity, mask), stats_of(logits[mask], 2, capacity)
    for a, b in zip(padded[:5], real[:5], strict=True):
        assert_close(a.double(), b.double())
    assert integer_sums([padded]).dtype == torch.int64
    assert padded.num_tokens == 9 and padded.counts_E.sum() == 18


def test_padding_alone_gives_zero_and_not_nan():
    logits = random_logits().requires_grad_()
    total = sum(losses([stats_of(logits, mask_T=torch.zeros(12, dtype=torch.bool))]))
    total.backward()
    assert total == 0 and torch.equal(logits.grad, torch.zeros(12, EXPERTS, dtype=torch.float64))


def test_metrics():
    # two layers: copies of 4 experts, tokens, dropped
    sums = torch.tensor([[6, 2, 0, 0, 8, 3], [2, 2, 2, 2, 8, 1]])
    metrics = {name: value.item() for name, value in load_metrics(sums).items()}
    assert metrics["load_max"] == 3.0  # 6 of 8 where 2 is fair
    assert metrics["dead_experts"] == 2
    assert metrics["drop_share"] == 4 / 16
    assert metrics["real_experts"] == 1.0
    assert load_metrics(torch.tensor([[6, 2, 4, 0], [3, 3, 4, 0]]))["real_experts"] == 1.75
    # (3/4, 1/4): bits over 2
    assert metrics["load_entropy"] == pytest.approx((0.8112781244591328 / 2 + 1) / 2)
    assert load_metrics(torch.tensor([[8, 8, 0]]))["load_entropy"] == 1, (
        "one expert is an even load"
    )


def test_sums_over_steps_hide_what_single_steps_have():
    """One layer has another busy expert in each of four steps, the other has one step that is worse
    than the others."""
    turning = torch.tensor(
        [[13, 1, 1, 1, 16, 4], [1, 13, 1, 1, 16, 4], [1, 1, 13, 1, 16, 4], [1, 1, 1, 13, 16, 4]]
    )
    once = torch.tensor(
        [[4, 4, 4, 4, 16, 0], [4, 4, 4, 4, 16, 0], [4, 4, 4, 4, 16, 0], [0, 0, 1, 15, 16, 8]]
    )
    steps_SL6 = torch.stack([turning, once], dim=1)
    found = over_steps([step_load(sums_L6, 2) for sums_L6 in steps_SL6])
    assert found.tolist() == [
        [
            13 / 4,
            13 / 4,
            14 / 8,
            14 / 8,
            4 / 16,
            4 / 16,
        ],  # median and worst of experts, of ranks, of drops
        [1, 15 / 4, 1, 16 / 8, 0, 8 / 16],
    ]
    assert load_metrics(steps_SL6[:, :1].sum(0))["load_max"] == 1, "the sums say: even"
    assert found.dtype == torch.float64


def test_the_busiest_rank_has_neighbouring_experts():
    counts_LE = torch.tensor([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0]])
    assert load_max(counts_LE, 4).tolist() == [3, 2, 0], (
        "a layer without copies has no busiest expert"
    )
    assert load_max(counts_LE, 2).tolist() == [2, 1, 0]
    assert load_max(counts_LE, 1).tolist() == [1, 1, 0]
