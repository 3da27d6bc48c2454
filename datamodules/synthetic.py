"""Computes tokens for benchmarks: batches and order are those of text, without a file or a tokenizer.

Token t of a stream is a hash of (seed, t), so any slice can be computed anywhere, in any order. All ids are equally
likely and independent: there is nothing to learn, and the loss stays at ln V.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from scmoe.datamodules.sequences import SequenceDataModule, TokenSplits


@dataclass(frozen=True)
class SyntheticTokens:
    """Gives `length` pseudo-random ids below `vocab_size`. stream: the number of the split."""

    seed: int
    stream: int
    length: int
    vocab_size: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        counter = np.arange(*part.indices(self.length), dtype=np.uint64)
        key = _mix(_mix(np.array([self.seed], np.uint64)) + np.uint64(self.stream))
        return (_mix(counter + key) % np.uint64(self.vocab_size)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64 that turns a counter into pseudo-random numbers."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SyntheticDataModule(SequenceDataModule):
    """Has 65,536 sequences for training and `val_sequences` (None: 64) each for validation and test.

    Each token counts as one byte, so bits per byte are bits per token.
    """

    def __init__(self, vocab_size: int = 4096, **sequences: Any) -> None:
        super().__init__(**sequences)
        self.vocab_size = vocab_size

    @cached_property
    def splits(self) -> TokenSplits:
        held_out = self.val_sequences or 64
        sequences = {"train": 1 << 16, "val": held_out, "test": held_out}
        tokens = {
            split: SyntheticTokens(self.seed, stream, count * self.seq_len + 1, self.vocab_size)
            for stream, (split, count) in enumerate(sequences.items())
        }
        return TokenSplits(tokens, np.ones(self.vocab_size, np.int64), f"synthetic-{self.vocab_size}")
