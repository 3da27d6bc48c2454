"""Sampling of the next token, and where a text ends.

A token is chosen from the logits: greedy, temperature, top-k, top-p, repetition penalty. A text
ends after a number of tokens, at a stop token, or at a stop string, which may cross tokens.

The order is that of transformers: penalty, temperature, top-k, top-p. Each text has a random
generator of its own, on the host, and draws one number per token (none if greedy), so a text does
not depend on the other texts of its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30  # above 0: logits over a smaller one exceed float32
LEAST_PENALTY = 1e-3  # and its inverse the largest; logits with a smaller one exceed float32


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature: divides the logits; 0: always the likeliest token. top_k: choose among this many
    of the likeliest tokens; None: all. top_p: choose among the smallest set of likeliest tokens
    whose probabilities add up to top_p. repetition_penalty: makes tokens that the text already has
    less likely (Keskar et al. 2019); 1: none. Raises ValueError for other values.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        is_usable = LEAST_TEMPERATURE <= self.temperature < float("inf")
        if self.temperature != 0 and not is_usable:
            raise ValueError(
                f"temperature is {self.temperature:g}, allowed: 0 (the likeliest token), or"
                f" {LEAST_TEMPERATURE:g} or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, allowed: 1 or more, or none for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p:g}, allowed: above 0, at most 1")
        if not LEAST_PENALTY <= self.repetition_penalty <= 1 / LEAST_PENALTY:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty:g}, allowed: {LEAST_PENALTY:g} to"
                f" {1 / LEAST_PENALTY:g}; 1 for none"
            )


GREEDY = Sampling(temperature=0.0, top_k=None)


def choose(
    logits_BV: Tensor, sampling: Sampling, had_BV: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return [B], the id of the next token of each text.

    had_BV: whether a text has a token already. generators: one for each text, on the host. Raises
    ValueError for logits that are not finite, unless the temperature is 0.
    """
    device = logits_BV.device
    wide_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logits_BV = penalised(wide_BV, sampling.repetition_penalty, had_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if torch.are_deterministic_algorithms_enabled():
        logits_BV = logits_BV.cpu()  # CUDA has no deterministic cumsum
    kept_BV = keep_top_k(logits_BV / sampling.temperature, sampling.top_k)
    kept_BV = keep_top_p(kept_BV, sampling.top_p)

    # A float32 draw is at most 1 - 2^-24, so the product with the total stays below it.
    draws_B = torch.cat([torch.rand(1, generator=generator) for generator in generators]).double()
    sums_BV = kept_BV.double().softmax(-1).cumsum(-1)
    if not sums_BV[:, -1].isfinite().all():
        raise ValueError("the model's logits are not finite, so no token can be drawn")
    drawn_B1 = draws_B.to(sums_BV.device)[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, drawn_B1, right=True)[:, 0].to(device)


def penalised(logits_BV: Tensor, penalty: float, had_BV: Tensor) -> Tensor:
    """Return the logits with less for tokens that the text has: positive ones are divided by the
    penalty, negative ones multiplied."""
    if penalty == 1:
        return logits_BV
    return logits_BV.where(~had_BV, (logits_BV / penalty).where(logits_BV > 0, logits_BV * penalty))


def keep_top_k(logits_BV: Tensor, top_k: int | None) -> Tensor:
    """Return the logits with -inf for all below the k-th largest."""
    if top_k is None or top_k >= logits_BV.shape[-1]:
        return logits_BV
    least_B1 = logits_BV.topk(top_k).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Return the logits with -inf for the least likely tokens, whose probabilities add up to at
    most 1 - top_p."""
    if top_p == 1:
        return logits_BV
    ascending_BV, order_BV = logits_BV.sort(-1)
    removed_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    removed_BV[:, -1] = False  # the likeliest stays
    return logits_BV.masked_fill(removed_BV.scatter(-1, order_BV, removed_BV), -torch.inf)


Reason = Literal["length", "stop_token", "stop_string"]


@dataclass(frozen=True)
class Stopping:
    """Where a text ends.

    max_tokens: new tokens of a text at most. tokens: ids that end it. strings: texts that end it;
    they require `decode`, which turns ids into text. Raises ValueError for other values.
    """

    max_tokens: int
    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, allowed: 1 or more")
        if "" in self.strings:
            raise ValueError("A stop string is empty. Give it at least one character.")
        if self.strings and self.decode is None:
            raise ValueError(
                "Stop strings require `decode`, which turns ids into text. Pass tokenizer.decode."
            )

    def reason(self, ids: Sequence[int]) -> Reason | None:
        """Return why a text with these new tokens ends; None: it goes on.

        Call it after each token.
        """
        if ids[-1] in self.tokens:
            return "stop_token"
        if self.strings and self.decode is not None:
            # A token has a byte or more, a character 4 bytes or less: a string that ends now began
            # within this tail.
            tail = self.decode(ids[-4 * max(map(len, self.strings)) - 4 :])
            if any(string in tail for string in self.strings):
                return "stop_string"
        return "length" if len(ids) >= self.max_tokens else None

    def text(self, ids: Sequence[int], ended: bool = True) -> str:
        """Return the text of new tokens, without the stop token and before the first stop string.

        ended: False leaves out the end that later tokens could change: half a character, or what
        may become a stop string.
        """
        assert self.decode is not None
        text = self.decode([i for i in ids if i not in self.tokens])
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        text = text[: min(starts, default=len(text))]
        if ended:
            return text
        text = text.rstrip("\ufffd")
        held_back = max((overlap(text, string) for string in self.strings), default=0)
        return text[: len(text) - held_back]


def overlap(text: str, string: str) -> int:
    """Return the length of the longest end of `text` with which `string` begins."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
