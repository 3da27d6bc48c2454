"""The gate (Eq. 2-5): which experts a token goes to, and with which weight.

    H(x) = x W_gate + eps,  eps = N(0, 1) softplus(x W_noise) in training
    G(x) = softmax over the kept top k of H(x)

For k = 1 a softmax over the kept logits is identically 1 and would give the gate no gradient; see
docs/decisions/0001-gate.md for the reading used here. Losses on the routing are in balance.py.

The paper's gate is a softmax. What differs between routers (scores, weights, the selection bias and
its rule) are values of `Scoring`:

    chosen     the top k of s_i + b_i, over N experts and Z zero experts
    weights    gamma s_i, or gamma s_i / sum of the kept s: the bias affects only the choice
    bias       after each update  b_i += rate s_0 rule(c_i / fair share)  for the N experts;
               that of zero experts stays

c_i are the copies of expert i in all batches of the step, before any is dropped; the fair share is
K T / (N + Z). So N experts get K N / (N + Z) of a token's K copies. s_0 is the score of an expert
where all logits are equal: 1 / (N + Z) for softmax, 1/2 for sigmoid. A rate relative to it means
the same for both, whatever the number of experts.

    by_sign         sign(1 - load)       DeepSeek-V3: its step 0.001 is a rate of 0.002
                                         (arXiv 2408.15664)
    in_proportion   1 - load             LongCat-Flash: its mu is the rate (arXiv 2509.01322)

Left out: a rate that decays, and a bias that is centred after each step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe.moe.operators import without_autocast
from scmoe.moe.tokens import Routing
from scmoe.moe.weights import InFloat32, WholeOnEveryRank

Score = Callable[[Tensor], Tensor]
Rule = Callable[[Tensor], Tensor]
LEAST_SUM = 1e-20  # of a sum of scores by which others are divided: sigmoid scores may all be 0
PROBES = 8  # rows of logits that a score is checked with
PROBE_STEP = 0.5  # by how much one logit of each grows
SUM_TOLERANCE = 1e-4  # of a sum of scores that should be 1
softmax: Score = partial(torch.softmax, dim=-1)


def by_sign(load_E: Tensor) -> Tensor:
    """Return the direction in which each bias moves; all move by the same step.

    load_E: copies of each expert over the fair share.
    """
    return torch.sign(1 - load_E)


def in_proportion(load_E: Tensor) -> Tensor:
    """Return by how much each bias moves: by what its expert lacks.

    load_E: copies of each expert over the fair share.
    """
    return 1 - load_E


@dataclass(frozen=True)
class Scoring:
    """The values by which routers differ.

    score: scores [T, N + Z] of logits; a score increases with its own logit. sums_to_one: those of
    a token do; if not, the load-balance loss divides them by their sum. normalise: weights are
    divided by the sum of a token's kept scores, where it keeps 2 or more. scale: gamma;
    moe.router_scale multiplies it. rule: moves the selection bias; None: there is no bias. rate: of
    the bias, relative to the score of equal logits; 0: the bias stays as it is. per_sequence: the
    load-balance loss is that of each sequence, not that of the global batch.
    """

    score: Score = softmax
    sums_to_one: bool = True
    normalise: bool = True
    scale: float = 1.0
    rule: Rule | None = None
    rate: float = 0.0
    per_sequence: bool = False

    def shares(self, scores_TE: Tensor) -> Tensor:
        """Return the scores of each token as a distribution over the experts."""
        if self.sums_to_one:
            return scores_TE
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=LEAST_SUM)

    def check(self, num_ids: int) -> None:
        """Compute scores of a few rows of logits.

        Raises ValueError if they are not what `score` and `sums_to_one` promise.
        """
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"Scoring.scale is {self.scale}. It must be finite and above 0.")
        with torch.device("cpu"):  # the model may be on the meta device, which has no numbers
            generator = torch.Generator()
            logits_PE = torch.randn(PROBES, num_ids, generator=generator, dtype=torch.float32)
            if type(logits_PE) is not Tensor:  # a counted step's have no numbers
                return
            chosen_P1 = torch.arange(PROBES)[:, None] % num_ids
            step_P1 = torch.full((PROBES, 1), PROBE_STEP, dtype=torch.float32)
            higher_PE = logits_PE.scatter_add(-1, chosen_P1, step_P1)
            scores_PE, higher_scores_PE = self._scores(logits_PE), self._scores(higher_PE)

        if not (scores_PE.isfinite().all() and (scores_PE >= 0).all()):
            raise ValueError(
                f"Scoring.score gives scores from {scores_PE.min():.3g} to {scores_PE.max():.3g}."
                " They become weights of experts and must be finite, 0 or more."
            )
        growth_P1 = (higher_scores_PE - scores_PE).gather(-1, chosen_P1)
        if num_ids > 1 and ((growth_P1 < 0).any() or not (growth_P1 > 0).any()):
            raise ValueError(
                "Scoring.score does not increase with its own logit. Experts with the highest"
                " logits are chosen, so their scores must be the highest."
            )
        sums_P = scores_PE.sum(-1)
        if self.sums_to_one and (sums_P - 1).abs().max() > SUM_TOLERANCE:
            raise ValueError(
                f"Scoring.score gives a token scores whose sum is between {sums_P.min():.3g} and"
                f" {sums_P.max():.3g}, but sums_to_one is True. Set sums_to_one=False; the"
                " load-balance loss then divides by the sum."
            )

    def _scores(self, logits_PE: Tensor) -> Tensor:
        try:
            scores_PE = self.score(logits_PE)
        except Exception as error:  # whatever a function of a user raises
            raise ValueError(
                f"Scoring.score cannot be computed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(scores_PE, Tensor) or scores_PE.shape != logits_PE.shape:
            is_tensor = isinstance(scores_PE, Tensor)
            shape = list(scores_PE.shape) if is_tensor else type(scores_PE).__name__
            raise ValueError(
                f"Scoring.score gives {shape} for logits {list(logits_PE.shape)}. Return equal"
                " shapes."
            )
        return scores_PE


THE_PAPERS = Scoring()  # Eq. 2-5
DEEPSEEK = Scoring(torch.sigmoid, sums_to_one=False, rule=by_sign, rate=0.002, per_sequence=True)
LONGCAT = Scoring(normalise=False, rule=in_proportion, rate=0.1)
SCORINGS = {"softmax": THE_PAPERS, "deepseek": DEEPSEEK, "longcat": LONGCAT}


class SelectionBias(WholeOnEveryRank):
    """b: added to the scores for the choice of experts. It has no gradient; `move` changes it.

    It is a parameter and not a buffer: DDP sends buffers before each forward, and weights are read
    by their names as parameters. Router keeps it in float32, and every rank has the whole of it.
    """

    def __init__(self, num_experts: int, zero_experts: int, scoring: Scoring) -> None:
        super().__init__()
        assert scoring.rule is not None
        self.num_experts, self.rule = num_experts, scoring.rule
        # on the host, because the next line reads it
        equal = torch.zeros(num_experts + zero_experts, dtype=torch.float64, device="cpu")
        self.step = scoring.rate * scoring.score(equal).mean().item()
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.zeros(len(equal), dtype=wide), requires_grad=False)

    def forward(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.detach() + self.weight

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    @torch.no_grad()
    def move(self, counts_E: Tensor, num_copies: Tensor) -> None:
        """Move the biases of experts by their load.

        counts_E: copies of each expert, over all ranks. num_copies: of all experts, zero experts
        included.
        """
        if self.step:  # in float64: the load of a fair share is exactly 1
            load_E = counts_E.double() * len(self.weight) / num_copies.clamp(min=1)
            self.weight[: self.num_experts] += (self.step * self.rule(load_E)).to(self.weight.dtype)


class Gate(nn.Linear):
    """x W^T in float32, or wider where x is.

    It is called like any module, so adapters and hooks of it have effect.
    """

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        return F.linear(x_TD, self.weight.to(x_TD.dtype))


class Router(InFloat32):
    """Scores all experts and keeps the top k of each token. The default scoring is the paper's
    softmax.

    Logits and scores are float32, or wider where the input is: bf16 logits tie and overflow the
    softmax. The weights stay in float32 in a module of bfloat16: a step of a selection bias would
    be rounded away.

    scoring: scores, weights, selection bias. noisy: Eq. 4's noise in training. deal: chooses in
    place of the gate, for measurements of speed (`round_robin`): returns the expert ids [T, K] of
    tokens [T, D], whose weights are still the gate's. zero_experts: further ids, from num_experts
    on, whose expert computes nothing (stream.py). Raises ValueError unless top_k is in
    1..num_experts, and for a score that `Scoring.check` refuses.
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
        self.num_experts = num_experts
        self.zero_experts = zero_experts
        self.num_ids = num_experts + zero_experts  # this id itself means none
        self.top_k = top_k
        self.deal = deal
        self.scoring = scoring
        scoring.check(self.num_ids)
        self.normalise = scoring.normalise and top_k > 1
        # the default may be bfloat16
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.gate = Gate(dim, self.num_ids, bias=False, dtype=wide)
        self.noise = Gate(dim, self.num_ids, bias=False, dtype=wide) if noisy else None
        self.bias: SelectionBias | None = None
        if scoring.rule is not None:
            self.bias = SelectionBias(num_experts, zero_experts, scoring)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        return super()._apply(lambda tensor: _wide(tensor, fn(tensor)), recurse)

    def forward(
        self, x_TD: Tensor, mask_T: Tensor | None = None, excluded_T1: Tensor | None = None
    ) -> Routing:
        """Route each token.

        mask_T False: padding, which gets expert id num_ids and weight 0. excluded_T1: an expert
        that each token must not go to (num_ids: none); requires top_k = 1.
        """
        # the gradients of gate and noise are added up first, so all sums have a fixed order
        x_TD = x_TD.view_as(x_TD)
        with without_autocast(x_TD.device.type):
            logits_TE = self.logits(x_TD)
            scores_TE = self.scoring.score(logits_TE)
            topk_ids_TK = self.choose(x_TD, self.preference(logits_TE, scores_TE), excluded_T1)
            weights_TK = scores_TE.gather(-1, topk_ids_TK)
            if self.normalise:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=LEAST_SUM)
            if self.scoring.scale != 1:
                weights_TK = weights_TK * self.scoring.scale
        if mask_T is not None:
            topk_ids_TK = topk_ids_TK.where(mask_T[:, None], self.num_ids)
            weights_TK = weights_TK.where(mask_T[:, None], 0.0)
        return Routing(topk_ids_TK, weights_TK, scores_TE, logits_TE)

    def choose(self, x_TD: Tensor, preference_TE: Tensor, excluded_T1: Tensor | None) -> Tensor:
        """Return expert ids, the most preferred first.

        In DGMoE it is the second where the first is excluded_T1.
        """
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
        """Return by what experts are chosen: scores + bias.

        Without a bias the logits have the same order, and fewer ties.
        """
        return logits_TE if self.bias is None else self.bias(scores_TE)

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = self.without_noise(x_TD)
        if self.noise is not None and self.training:
            spread_TE = F.softplus(self.noise(x_TD))
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
        return logits_TE

    def without_noise(self, x_TD: Tensor) -> Tensor:
        return self.gate(x_TD)


def round_robin(num_experts: int, top_k: int) -> Callable[[Tensor], Tensor]:
    """Return a deal of expert ids 0, 1, 2, ... in turn to the T K copies."""
    return partial(_in_turn, num_experts, top_k)


def _in_turn(num_experts: int, top_k: int, x_TD: Tensor) -> Tensor:
    copies = torch.arange(x_TD.shape[0] * top_k, device=x_TD.device)
    return (copies % num_experts).view(-1, top_k)


def _wide(tensor: Tensor, moved: Tensor) -> Tensor:
    """Return `moved`, which a change of device or dtype has made of a tensor.

    Where that is narrower than float32, return the tensor on its device in float32.
    """
    return tensor.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved
