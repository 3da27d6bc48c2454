"""What a layer is asked with: weights, tokens, and how these are spread over ranks.

All ranks draw the same whole batch from one seed, and each takes its own rows. So the batch does
not depend on the number of ranks. It has a part for each rank, or for each group of ranks that
share tokens. The loss of a rank is the sum of its outputs times `upstream`,
and the loss of all ranks is the sum of theirs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scmoe.conform.plain import DIM, EXPERTS, TOP_K, WIDTH, Weights

SEED = 54
TOKENS = 48  # of all ranks
# A token's K-th and next logits differ by this or more, so that rounding chooses no other expert.
MARGIN = 0.1
DRAWS = 20  # tokens drawn for each that is kept
PULL = 5.0  # by how much logits are raised where all tokens go to the same experts
PUSH = -20.0  # likewise for the expert that no token goes to


class Problem(NamedTuple):
    """One rank's part. x_TD: its tokens. upstream_TD: what its outputs are multiplied by. rows_T:
    where its tokens stand in the whole batch."""

    x_TD: Tensor
    upstream_TD: Tensor
    rows_T: Tensor


def draw_weights(dtype: torch.dtype, load: str = "usual", seed: int = SEED) -> Weights:
    """Return weights with a standard deviation of about 1 / sqrt(fan-in).

    The first element of each token stays 1 under the projection. It is what `load` pulls at: "one
    expert": every token keeps experts 0 to K - 1. "an expert without tokens": none keeps the last.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (numbers / shape[-1] ** 0.5).to(dtype)

    projection, router = draw(DIM, DIM), 2 * draw(EXPERTS, DIM)
    projection[0] = torch.eye(DIM)[0]
    router[:, 0] = 0
    if load == "one expert":
        router /= 4
        router[:TOP_K, 0] = PULL
    elif load == "an expert without tokens":
        router[-1, 0] = PUSH

    experts = {}
    for i in range(EXPERTS):
        experts[i] = {"gate": draw(WIDTH, DIM), "up": draw(WIDTH, DIM), "down": draw(DIM, WIDTH)}
    return Weights(projection, router, experts)


def draw_tokens(weights: Weights, dtype: torch.dtype) -> Tensor:
    """Return tokens [T, D] whose choice of experts no rounding changes, with and without the
    projection."""
    generator = torch.Generator().manual_seed(SEED + 1)
    x_TD = torch.randn(DRAWS * TOKENS, DIM, generator=generator, dtype=torch.float64)
    x_TD[:, 0] = 1
    x_TD = x_TD.to(dtype)
    clear_T = torch.ones(len(x_TD), dtype=torch.bool)
    for tokens_TD in (x_TD.double(), x_TD.double() @ weights.projection.double().T):
        best_TE = (tokens_TD @ weights.router.double().T).sort(descending=True).values
        clear_T &= best_TE[:, TOP_K - 1] - best_TE[:, TOP_K] > MARGIN
    assert clear_T.sum() >= TOKENS
    return x_TD[clear_T][:TOKENS]


def shares(spread: str, parts: int) -> list[int]:
    """Return how many tokens each part of the batch has."""
    if spread == "none in the last" and parts > 1:
        return [*shares("even", parts - 1), 0]
    if spread == "unequal":
        odd = [2 * part + 1 for part in range(parts)]
        each = [TOKENS * number // sum(odd) for number in odd]
        return [TOKENS - sum(each[1:]), *each[1:]]
    return [TOKENS // parts] * parts


def draw_problem(
    weights: Weights, part: int, parts: int, spread: str = "even", order: Tensor | None = None
) -> Problem:
    """Return a part of the batch. order: of all tokens; None: as they were drawn."""
    dtype = weights.router.dtype
    x_TD = draw_tokens(weights, dtype)
    generator = torch.Generator().manual_seed(SEED + 2)
    upstream_TD = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64) / TOKENS
    order = torch.arange(TOKENS) if order is None else order
    rows_T = order.split(shares(spread, parts))[part]
    return Problem(x_TD[rows_T], upstream_TD[rows_T].to(dtype), rows_T)


def pieces_of(problem: Problem, pieces: int) -> list[Problem]:
    """Return batches with a rank's tokens."""
    parts = zip(*(tensor.chunk(pieces) for tensor in problem), strict=True)
    return [Problem(*part) for part in parts]
