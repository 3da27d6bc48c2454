"""Tokens out of nothing, for benchmarks: the same batches and order as text, without a file or a tokenizer.

Token t of a stream is a hash of (seed, t), so any slice can be made anywhere, in any order, and is always the same. All
ids are equally likely and independent: there is nothing to learn, and the loss stays at ln V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.sequences import SequenceDataModule, TokenSplits


@dataclass(frozen=True)
class SyntheticTokens:
    """`length` pseudo-random ids below `vocab_size`; `stream` tells splits of one seed apart."""

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
    """SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64 whose outputs on a counter pass as random."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SyntheticDataModule(SequenceDataModule):
    """65,536 sequences of training, and `val_sequences` (null: 64) of validation and test.

    Each token counts as one byte, so bits per byte are bits per token.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        seq_len: int = 256,
        global_batch_size: int = 32,
        accumulate: int = 1,
        num_batches: int = 200,
        val_sequences: int | None = None,
        workers: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            global_batch_size=global_batch_size,
            accumulate=accumulate,
            num_batches=num_batches,
            val_sequences=val_sequences,
            workers=workers,
            seed=seed,
        )
        self.vocab_size = vocab_size

    def open_splits(self) -> TokenSplits:
        held_out = self.val_sequences or 64
        sequences = {"train": 1 << 16, "val": held_out, "test": held_out}
        tokens = {
            split: SyntheticTokens(self.seed, stream, count * self.seq_len + 1, self.vocab_size)
            for stream, (split, count) in enumerate(sequences.items())
        }
        return TokenSplits(tokens, np.ones(self.vocab_size, np.int64), f"synthetic-{self.vocab_size}")
