"""Load balance: the router's sums, the two losses computed from them, and metrics of the load.

Losses do not depend on the topology. The expert fractions f are those of the global batch: the
ranks add up their integer sums (one small all-reduce for all layers together). Each rank computes
its own share of the loss, scaled so that the mean over ranks, which data parallelism takes of
gradients, is the loss of the global batch.
"""

import math

import torch
from torch import Tensor

from scmoe.moe.layout import Layout, count
from scmoe.moe.tokens import RouterStats, Routing


def router_stats(
    routing: Routing,
    layout: Layout,
    mask_T: Tensor | None,
    num_experts: int,
    seq_len: int | None = None,
) -> RouterStats:
    """Return the sums of one MoE layer over this rank's tokens.

    routing.scores_TE: must sum to one for each token. num_experts: without zero experts, whose
    copies need no row. seq_len: of the sequences, if the load-balance loss is that of each
    sequence; None: it is that of the batch.
    """
    scores_TE, z_T = routing.scores_TE, routing.logits_TE.logsumexp(-1).square()
    (T, E), K = scores_TE.shape, routing.topk_ids_TK.shape[1]
    # created on the device: nothing waits for the host
    num_tokens = torch.full((), T, device=scores_TE.device)
    if mask_T is not None:
        scores_TE, z_T = scores_TE * mask_T[:, None], z_T * mask_T
        num_tokens = mask_T.sum()
    ids_N = routing.topk_ids_TK.flatten()
    counts_E, counts_Z = count(ids_N, E).tensor_split([num_experts])
    num_dropped = layout.num_dropped - (T - num_tokens) * K - counts_Z.sum()
    if seq_len is not None:
        copies_BE = count(ids_N.view(T // max(seq_len, 1), seq_len * K), E).to(scores_TE.dtype)
        f_BE = copies_BE / copies_BE.sum(1, keepdim=True).clamp(min=1)
        scores_TE = scores_TE * f_BE.repeat_interleave(seq_len, 0)
    return RouterStats(
        counts_E, scores_TE.sum(0), z_T.sum(), num_tokens, num_dropped, K, seq_len is not None
    )


def add_stats(a: RouterStats, b: RouterStats) -> RouterStats:
    """Return the sums of both: those of routing both batches at once."""
    return a._replace(
        counts_E=a.counts_E + b.counts_E,
        score_sums_E=a.score_sums_E + b.score_sums_E,
        z_sum=a.z_sum + b.z_sum,
        num_tokens=a.num_tokens + b.num_tokens,
        num_dropped=a.num_dropped + b.num_dropped,
    )


def integer_sums(stats: list[RouterStats]) -> Tensor:
    """Return [L, E + 2] int64: per layer the copies of each expert, tokens, dropped copies.

    Add them up over ranks.
    """
    return torch.stack(
        [torch.cat([s.counts_E, torch.stack([s.num_tokens, s.num_dropped])]) for s in stats]
    )


def load_balance_loss(stats: list[RouterStats], sums_LE2: Tensor, world_size: int = 1) -> Tensor:
    """Return the mean over layers of E sum_i f_i P_i (GShard, Switch).

    It is 1 for an even load, E where one expert takes all. f_i: share of the global batch's copies
    that goes to expert i. P_i: mean score of expert i over the global batch. Per sequence
    (DeepSeek-V3, Eq. 17-20) f_i and P_i are those of a sequence, and the loss is the mean over
    sequences, weighted by their tokens. E counts zero experts. Over the global batch the copies to
    all zero experts are divided evenly among them in f; per sequence, each has its own. stats: this
    rank's sums. sums_LE2: integer_sums, added up over world_size ranks.
    """
    score_sums_LE = torch.stack([s.score_sums_E for s in stats])
    counts_LE, tokens_L = sums_LE2[:, :-2], sums_LE2[:, -2]
    share_LE = score_sums_LE * world_size / tokens_L[:, None].clamp(min=1)
    if stats[0].per_sequence:
        return share_LE.shape[1] * share_LE.sum(1).mean()
    copies_L1 = of_experts_L1 = counts_LE.sum(1, keepdim=True)
    counts_LE = counts_LE.to(score_sums_LE.dtype)
    if zero_experts := share_LE.shape[1] - counts_LE.shape[1]:
        copies_L = torch.stack([n * s.top_k for n, s in zip(tokens_L, stats, strict=True)])
        copies_L1 = copies_L[:, None]
        each_L1 = (copies_L1 - of_experts_L1).to(counts_LE.dtype) / zero_experts
        counts_LE = torch.cat([counts_LE, each_L1.expand(-1, zero_experts)], 1)
    f_LE = counts_LE / copies_L1.clamp(min=1)
    return share_LE.shape[1] * (f_LE * share_LE).sum(1).mean()


def router_z_loss(stats: list[RouterStats], sums_LE2: Tensor, world_size: int = 1) -> Tensor:
    """Return the mean over layers and tokens of logsumexp(logits)^2 (ST-MoE).

    It keeps the gate's logits small.
    """
    z_sums_L = torch.stack([s.z_sum for s in stats])
    return (z_sums_L * world_size / sums_LE2[:, -2].clamp(min=1)).mean()


def load_max(counts_LE: Tensor, parts: int) -> Tensor:
    """Return [L] float64: the copies of the busiest part over the fair share.

    It is 0 in a layer without copies. parts: the number of experts, or that of expert-parallel
    ranks, which hold neighbouring experts.
    """
    loads_LP = counts_LE.double().unflatten(-1, (parts, -1)).sum(-1)
    return loads_LP.amax(-1) * parts / loads_LP.sum(-1).clamp(min=1)


def load_metrics(sums_LE2: Tensor) -> dict[str, Tensor]:
    """Return metrics of how even the load is.

    sums_LE2: integer_sums, added up over ranks, and over steps where the caller does so. load_max:
    the busiest expert's copies over the fair share, worst layer. load_entropy: mean over layers; 1
    for an even load, 0 where one expert takes all. dead_experts: experts without a token, summed
    over layers. drop_share: share of all copies that was dropped. real_experts: copies of a token
    that go to an expert and not to a zero expert, mean over layers; in DGMoE, copies of one of a
    token's two representations.
    """
    sums_LE2 = sums_LE2.double()
    counts_LE = sums_LE2[:, :-2]
    tokens_L = sums_LE2[:, -2]
    dropped_L = sums_LE2[:, -1]
    num_experts = counts_LE.shape[1]
    copies_L = counts_LE.sum(1).clamp(min=1)
    p_LE = counts_LE / copies_L[:, None]
    if num_experts > 1:
        entropy_L = -torch.xlogy(p_LE, p_LE).sum(1) / math.log(num_experts)
    else:
        entropy_L = torch.ones_like(p_LE[:, 0])
    return {
        "load_max": load_max(counts_LE, num_experts).max(),
        "load_entropy": entropy_L.mean(),
        "dead_experts": (counts_LE == 0).sum(),
        "drop_share": dropped_L.sum() / copies_L.sum(),
        "real_experts": (counts_LE.sum(1) / tokens_L.clamp(min=1)).mean(),
    }


SINGLE_STEPS = (
    "step_load_max",
    "step_load_worst",
    "rank_load_max",
    "rank_load_worst",
    "step_drop",
    "step_drop_worst",
)


def step_load(sums_LE2: Tensor, num_ranks: int) -> Tensor:
    """Return the load of one optimizer step, [L, 3] float64.

    The columns are the copies of the busiest expert and of the busiest of num_ranks expert-parallel
    ranks, each over the fair share, and the share of copies dropped. sums_LE2: of the step, over
    ranks and batches; sums over several steps would hide what one step has, because another expert
    is busy in each. With several groups of expert-parallel ranks, ranks with the same experts count
    as one.
    """
    counts_LE, dropped_L = sums_LE2[:, :-2], sums_LE2[:, -1]
    drop_L = dropped_L.double() / counts_LE.sum(1).clamp(min=1)
    return torch.stack(
        [load_max(counts_LE, counts_LE.shape[1]), load_max(counts_LE, num_ranks), drop_L], dim=1
    )


def over_steps(loads: list[Tensor]) -> Tensor:
    """Return the median and the worst of some steps, [L, 6], as SINGLE_STEPS names them.

    loads: `step_load` of each step.
    """
    loads_SL3 = torch.stack(loads)
    return torch.stack([loads_SL3.quantile(0.5, dim=0), loads_SL3.amax(0)], dim=-1).flatten(1)
