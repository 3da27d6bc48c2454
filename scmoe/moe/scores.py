"""What differs between routers: scores, weights, the selection bias and its rule. Router (router.py) holds the rest.

    chosen     the top k of s_i + b_i, over N experts and Z zero experts
    weights    gamma s_i, or gamma s_i / sum of the kept s: the bias chooses and never weighs
    bias       after each update  b_i += rate s_0 rule(c_i / fair share),  for the N experts; zero experts' stays

c_i are the copies of expert i in all batches of the step, before any is dropped; the fair share is K T / (N + Z). So N
experts get K N / (N + Z) of a token's K copies. s_0 is the score of an expert where all logits are equal: 1 / (N + Z)
for softmax, 1/2 for sigmoid. A rate relative to it means the same for both, whatever the number of experts.

    by_sign         sign(1 - load)       DeepSeek-V3: its step 0.001 is a rate of 0.002 (arXiv 2408.15664)
    in_proportion   1 - load             LongCat-Flash: its mu is the rate (arXiv 2509.01322)

Left out: a rate that decays, and a bias that is centred after each step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

Score = Callable[[Tensor], Tensor]
Rule = Callable[[Tensor], Tensor]
LEAST = 1e-20  # of a sum of scores by which others are divided: sigmoid scores may all be 0
softmax: Score = partial(torch.softmax, dim=-1)


def by_sign(load_E: Tensor) -> Tensor:
    """load_E: copies of each expert over the fair share. Every bias moves by the same step."""
    return torch.sign(1 - load_E)


def in_proportion(load_E: Tensor) -> Tensor:
    """load_E: copies of each expert over the fair share. A bias moves by what its expert lacks."""
    return 1 - load_E


@dataclass(frozen=True)
class Scoring:
    """The values by which routers differ.

    score: scores [T, N + Z] of logits; a score increases with its own logit. sums_to_one: those of a token do; if not,
    the load-balance loss divides them by their sum. normalise: weights are divided by the sum of a token's kept scores,
    where it keeps 2 or more. scale: gamma. rule: moves the selection bias; None: there is no bias. rate: of the bias,
    relative to the score of equal logits; 0: the bias stays as it is. per_sequence: the load-balance loss is that of
    each sequence, not that of the global batch.
    """

    score: Score = softmax
    sums_to_one: bool = True
    normalise: bool = True
    scale: float = 1.0
    rule: Rule | None = None
    rate: float = 0.0
    per_sequence: bool = False

    def shares(self, scores_TE: Tensor) -> Tensor:
        """The scores of each token as a distribution over the experts."""
        return scores_TE if self.sums_to_one else scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=LEAST)


THE_PAPERS = Scoring()  # Eq. 2-5


class SelectionBias(nn.Module):
    """b: added to the scores for the choice of experts. It has no gradient; `move` changes it.

    It is a parameter and not a buffer: DDP sends buffers before each forward, and weights are read by their names as
    parameters. Router keeps it in float32, and every rank has the whole of it.
    """

    def __init__(self, num_experts: int, zero_experts: int, scoring: Scoring) -> None:
        super().__init__()
        assert scoring.rule is not None
        self.num_experts, self.rule = num_experts, scoring.rule
        equal = torch.zeros(num_experts + zero_experts, dtype=torch.float64, device="cpu")  # the next line reads it
        self.step = scoring.rate * scoring.score(equal).mean().item()
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.zeros(len(equal), dtype=wide), requires_grad=False)

    def forward(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.detach() + self.weight

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    @torch.no_grad()
    def move(self, counts_E: Tensor, num_copies: Tensor) -> None:
        """counts_E: copies of each expert, over all ranks. num_copies: of all experts, zero experts included."""
        if self.step:  # in float64: the load of a fair share is exactly 1
            load_E = counts_E.double() * len(self.weight) / num_copies.clamp(min=1)
            self.weight[: self.num_experts] += (self.step * self.rule(load_E)).to(self.weight.dtype)
