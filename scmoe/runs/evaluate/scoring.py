"""Scores tokens with a language model: the log-likelihood of a text, or of an answer after a question.

A sequence is longer than the model's context in general, so windows slide over it. Each token is scored once, in a
window that shows the model at least `context - stride` of the tokens before it, or all of them where there are fewer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe.datamodules.positioned import IGNORE
from scmoe.runs.evaluate.rank_zero import Forward

BATCH_TOKENS = 2048  # of a batch, padding included: with a vocabulary of 50,000 its logits take 0.4 GB


class Window(NamedTuple):
    """The model reads tokens [start : stop - 1] and is scored on tokens [first : stop]."""

    start: int
    first: int
    stop: int


class Score(NamedTuple):
    """log_likelihood: in nats. greedy: each scored token was the likeliest."""

    log_likelihood: float
    num_tokens: int
    greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Scores sequences of token ids. context: tokens that the model reads at most."""

    forward: Forward
    context: int
    device: torch.device

    def __call__(self, sequences: Sequence[tuple[np.ndarray, int]], stride: int | None = None) -> list[Score]:
        """Return a score for each (ids, first): that of ids[first:], given what is before; first is 1 or more.

        stride: tokens that a further window scores at most; None: the whole context, the fewest windows.
        """
        log_likelihoods, greedy = np.zeros(len(sequences)), np.ones(len(sequences), bool)
        windows = [
            (i, window)
            for i, (ids, first) in enumerate(sequences)
            for window in windows_of(len(ids), first, self.context, stride or self.context)
        ]
        windows.sort(key=lambda pair: pair[1].start - pair[1].stop)  # the longest first: little padding
        for batch in batches(windows):
            nats_B, likeliest_B = self.score([sequences[i][0] for i, _ in batch], [window for _, window in batch])
            for (i, _), nats, likeliest in zip(batch, nats_B, likeliest_B, strict=True):
                log_likelihoods[i] -= nats
                greedy[i] &= likeliest
        counts = [len(ids) - first for ids, first in sequences]
        return [Score(float(x), n, bool(g)) for x, n, g in zip(log_likelihoods, counts, greedy, strict=True)]

    def score(self, ids: Sequence[np.ndarray], windows: Sequence[Window]) -> tuple[list[float], list[bool]]:
        """Return for one window of each sequence the nats of its scored tokens, and whether all are the likeliest."""
        longest = max(window.stop - window.start for window in windows) - 1
        inputs_BS = torch.zeros(len(ids), longest, dtype=torch.int64)
        labels_BS, mask_BS = torch.full_like(inputs_BS, IGNORE), torch.zeros_like(inputs_BS, dtype=torch.bool)
        for row, (tokens, (start, first, stop)) in enumerate(zip(ids, windows, strict=True)):
            inputs_BS[row, : stop - 1 - start] = torch.from_numpy(tokens[start : stop - 1])
            labels_BS[row, first - 1 - start : stop - 1 - start] = torch.from_numpy(tokens[first:stop])
            mask_BS[row, : stop - 1 - start] = True
        labels_BS = labels_BS.to(self.device)
        logits_BSV = self.forward(inputs_BS.to(self.device), mask_BS.to(self.device))[0]
        nats_BS = F.cross_entropy(_wide(logits_BSV).mT, labels_BS, ignore_index=IGNORE, reduction="none")
        likeliest_BS = (logits_BSV.argmax(-1) == labels_BS) | (labels_BS == IGNORE)
        return nats_BS.double().sum(1).tolist(), likeliest_BS.all(1).tolist()


def windows_of(num_tokens: int, first: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows that score the tokens from `first` on, each once.

    The first window reaches as far as the context does from the start of the text; each further one scores up to
    `stride` tokens and shows the tokens before them for as long as the context allows.
    """
    while first < num_tokens:
        stop = min(num_tokens, max(first + stride, context + 1))
        yield Window(max(0, stop - 1 - context), first, stop)
        first = stop


def batches(windows: Sequence[tuple[int, Window]]) -> Iterator[Sequence[tuple[int, Window]]]:
    """Cut windows, the longest first, into batches of about BATCH_TOKENS with padding."""
    start = 0
    while start < len(windows):
        longest = windows[start][1]
        size = max(1, BATCH_TOKENS // (longest.stop - longest.start))
        yield windows[start : start + size]
        start += size


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
