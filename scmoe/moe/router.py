"""The gate (Eq. 2-5): which experts a token goes to, and with which weight.

The paper's gate is a softmax; other scores, a scale and a selection bias are values of `Scoring` (scores.py).
H(x) = x W_gate + eps,  eps = N(0, 1) softplus(x W_noise) in training;  G(x) = softmax over the kept top k of H(x).
For k = 1 a softmax over the kept logits is identically 1 and would give the gate no gradient; see
docs/decisions/0001-gate.md for the reading used here. Losses on the routing are in balance.py.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe.moe.operators import without_autocast
from scmoe.moe.scores import LEAST, THE_PAPERS, Scoring, SelectionBias
from scmoe.moe.tokens import Routing


class Router(nn.Module):
    """Scores all experts and keeps the top k of each token. Without another `scoring` they are the softmax's.

    Logits and scores are float32, or wider where the input is: bf16 logits tie and overflow the softmax. The weights
    stay in float32 in a module of bfloat16: a step of a selection bias would be rounded away.

    scoring: scores, weights, selection bias. noisy: Eq. 4's noise in training.
    deal: returns the expert ids [T, K] of tokens [T, D]; the gate's choice is ignored, its weights are not. For
    measurements of speed, such as `round_robin`.
    zero_experts: further ids, from num_experts on, whose expert computes nothing (stream.py).
    Raises ValueError unless top_k is in 1..num_experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Scoring = THE_PAPERS,
        noisy: bool = False,
        deal: Callable[[Tensor], Tensor] | None = None,
        zero_experts: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, allowed: 1..num_experts ({num_experts})")
        self.num_experts, self.top_k, self.deal, self.scoring = num_experts, top_k, deal, scoring
        self.zero_experts, self.num_ids = zero_experts, num_experts + zero_experts  # the second also means none
        self.normalise = scoring.normalise and top_k > 1
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)  # the default may be bfloat16
        self.gate = nn.Linear(dim, self.num_ids, bias=False, dtype=wide)
        self.noise = nn.Linear(dim, self.num_ids, bias=False, dtype=wide) if noisy else None
        self.bias = None if scoring.rule is None else SelectionBias(num_experts, zero_experts, scoring)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        return super()._apply(lambda tensor: _wide(tensor, fn(tensor)), recurse)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, excluded_T1: Tensor | None = None) -> Routing:
        """Routes each token. mask_T False: padding, which gets expert id num_ids and weight 0.

        excluded_T1: an expert that each token must not go to (num_ids: none); requires top_k = 1."""
        x_TD = x_TD.view_as(x_TD)  # the gradients of gate and noise are added up first, so all sums have a fixed order
        with without_autocast(x_TD.device.type):
            logits_TE = self.logits(x_TD)
            scores_TE = self.scoring.score(logits_TE)
            topk_ids_TK = self.choose(x_TD, self.preference(logits_TE, scores_TE), excluded_T1)
            weights_TK = scores_TE.gather(-1, topk_ids_TK)
            if self.normalise:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=LEAST)
            if self.scoring.scale != 1:
                weights_TK = weights_TK * self.scoring.scale
        if mask_T is not None:
            topk_ids_TK = topk_ids_TK.where(mask_T[:, None], self.num_ids)
            weights_TK = weights_TK.where(mask_T[:, None], 0.0)
        return Routing(topk_ids_TK, weights_TK, scores_TE, logits_TE)

    def choose(self, x_TD: Tensor, preference_TE: Tensor, excluded_T1: Tensor | None) -> Tensor:
        """Return expert ids, the most preferred first. DGMoE: the second where the first is excluded_T1."""
        if excluded_T1 is None:
            if self.deal is not None:
                return self.deal(x_TD)
            if self.top_k == 1:
                return preference_TE.argmax(-1, keepdim=True)
            return preference_TE.topk(self.top_k).indices
        assert self.top_k == 1
        if self.deal is not None:
            return (excluded_T1 + 1) % self.num_experts
        best_T1, second_T1 = preference_TE.topk(2).indices.split(1, dim=-1)
        return best_T1.where(best_T1 != excluded_T1, second_T1)

    def preference(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """By what experts are chosen: scores + bias. Without a bias the logits have the same order, and fewer ties."""
        return logits_TE if self.bias is None else self.bias(scores_TE)

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = self.without_noise(x_TD)
        if self.noise is not None and self.training:
            x_TD = x_TD.to(logits_TE.dtype)
            spread_TE = F.softplus(F.linear(x_TD, self.noise.weight.to(x_TD.dtype)))
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
        return logits_TE

    def without_noise(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        return F.linear(x_TD, self.gate.weight.to(x_TD.dtype))


def round_robin(num_experts: int, top_k: int) -> Callable[[Tensor], Tensor]:
    """Return a deal of expert ids 0, 1, 2, ... in turn to the T K copies."""
    return partial(_in_turn, num_experts, top_k)


def _in_turn(num_experts: int, top_k: int, x_TD: Tensor) -> Tensor:
    copies = torch.arange(x_TD.shape[0] * top_k, device=x_TD.device)
    return (copies % num_experts).view(-1, top_k)


def _wide(tensor: Tensor, moved: Tensor) -> Tensor:
    """What a change of device or dtype has made of a tensor, in float32 where that is narrower."""
    return tensor.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved
