"""The gate (Eq. 2-5): which experts a token goes to, and with which weight.

H(x) = x W_gate + eps,  eps = N(0, 1) softplus(x W_noise) in training;  G(x) = softmax over the kept top k of H(x).
For k = 1 a softmax over the kept logits is identically 1 and would give the gate no gradient; see
docs/decisions/0001-gate.md for the reading used here. Losses on the routing are in balance.py.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe.moe.tokens import Routing


class Router(nn.Module):
    """Softmax over all experts, top k kept; renormalised for k >= 2, the raw probability for k = 1.

    Logits and scores are float32, or wider where the input is: bf16 logits tie and overflow the softmax.

    renormalise: False leaves the raw probabilities for k >= 2 too (OLMoE, Qwen2-MoE).
    noisy: Eq. 4's noise in training.
    deal: returns the expert ids [T, K] of tokens [T, D]; the gate's choice is ignored, its weights are not. For
    measurements of speed, such as `round_robin`.
    Raises ValueError unless top_k is in 1..num_experts.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        renormalise: bool = True,
        noisy: bool = False,
        deal: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, allowed: 1..num_experts ({num_experts})")
        self.num_experts, self.top_k, self.deal = num_experts, top_k, deal
        self.renormalise = renormalise and top_k > 1
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.noise = nn.Linear(dim, num_experts, bias=False) if noisy else None

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, excluded_T1: Tensor | None = None) -> Routing:
        """Routes each token. mask_T False: padding, which gets expert id num_experts and weight 0.

        excluded_T1: an expert that each token must not go to (num_experts: none); requires top_k = 1."""
        x_TD = x_TD.view_as(x_TD)  # the gradients of gate and noise are added up first, so all sums have a fixed order
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            scores_TE = logits_TE.softmax(-1)
            topk_ids_TK = self.choose(x_TD, logits_TE, excluded_T1)
            weights_TK = scores_TE.gather(-1, topk_ids_TK)
            if self.renormalise:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if mask_T is not None:
            topk_ids_TK = topk_ids_TK.where(mask_T[:, None], self.num_experts)
            weights_TK = weights_TK.where(mask_T[:, None], 0.0)
        return Routing(topk_ids_TK, weights_TK, scores_TE, logits_TE)

    def choose(self, x_TD: Tensor, logits_TE: Tensor, excluded_T1: Tensor | None) -> Tensor:
        """Return expert ids, the most likely first. DGMoE: the second most likely where the first is excluded_T1."""
        if excluded_T1 is None:
            if self.deal is not None:
                return self.deal(x_TD)
            return logits_TE.argmax(-1, keepdim=True) if self.top_k == 1 else logits_TE.topk(self.top_k).indices
        assert self.top_k == 1
        if self.deal is not None:
            return (excluded_T1 + 1) % self.num_experts
        best_T1, second_T1 = logits_TE.topk(2).indices.split(1, dim=-1)
        return best_T1.where(best_T1 != excluded_T1, second_T1)

    def logits(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        logits_TE = F.linear(x_TD, self.gate.weight.to(x_TD.dtype))
        if self.noise is not None and self.training:
            spread_TE = F.softplus(F.linear(x_TD, self.noise.weight.to(x_TD.dtype)))
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
        return logits_TE


def round_robin(num_experts: int, top_k: int) -> Callable[[Tensor], Tensor]:
    """Return a deal of expert ids 0, 1, 2, ... in turn to the T K copies."""
    return partial(_in_turn, num_experts, top_k)


def _in_turn(num_experts: int, top_k: int, x_TD: Tensor) -> Tensor:
    copies = torch.arange(x_TD.shape[0] * top_k, device=x_TD.device)
    return (copies % num_experts).view(-1, top_k)
