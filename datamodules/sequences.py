"""Batches from a flat array of tokens, for text (`text.py`) and for the synthetic tokens of
benchmarks.

    training    {"input_ids", "labels"}: int64 [B, S], labels are the next tokens
    val, test   also "num_bytes": int64 [B], UTF-8 bytes of a window's targets, and "padding_mask":
                bool [B, S], True at real tokens. Windows do not overlap and cover every target
                once; the last one is padded. Padding and filler windows have input id 0, label -100
                and no bytes.

The order of samples is in `positioned.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from scmoe.datamodules.positioned import IGNORE, PositionedDataModule, SampleOrder

COUNT_CHUNK = 1 << 24  # tokens counted at a time


class Tokens(Protocol):
    """A flat array of token ids, in memory, on disk or computed."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class TokenSplits:
    """The tokens of train, val and test.

    token_bytes_V: bytes of each id, int64. content: a text that identifies the content.
    """

    tokens: Mapping[str, Tokens]
    token_bytes_V: np.ndarray
    content: str


@dataclass(eq=False)
class TrainSequences(Dataset):
    """Sample i is the tokens [i S : i S + S + 1], as inputs and labels shifted by one."""

    tokens: Tokens
    seq_len: int

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        start = i * self.seq_len
        sequence = self.tokens[start : start + self.seq_len + 1].astype(np.int64)
        return {"input_ids": sequence[:-1], "labels": sequence[1:]}


class EvalWindows(Dataset):
    """Windows of S targets that cover the tokens once, or `limit` of them evenly spread. Items
    after the last one are filler."""

    def __init__(
        self, tokens: Tokens, seq_len: int, token_bytes_V: np.ndarray, limit: int | None
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.token_bytes_V = token_bytes_V
        self.num_windows = -(-max(0, len(tokens) - 1) // seq_len)
        self.limit = self.num_windows if limit is None else min(limit, self.num_windows)

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, i: int) -> dict[str, Any]:
        window = self.window(i) if i < self.limit else np.empty(0, np.int64)
        real = max(0, len(window) - 1)
        input_ids = np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORE, np.int64)
        input_ids[:real] = window[:-1]
        labels[:real] = window[1:]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "num_bytes": self.token_bytes_V[window[1:]].sum(),
            "padding_mask": np.arange(self.seq_len) < real,
        }

    def window(self, i: int) -> np.ndarray:
        """Return the tokens of window `i`, int64, up to S + 1: the first is only input, the last
        only target."""
        start = i * self.num_windows // self.limit * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)


class SequenceDataModule(PositionedDataModule):
    """A data module whose samples are sequences. A subclass opens the `TokenSplits` as `splits`."""

    def __init__(
        self, *, seq_len: int = 256, val_sequences: int | None = None, **position: Any
    ) -> None:
        super().__init__(**position)
        if seq_len < 1 or (val_sequences is not None and val_sequences < 1):
            raise ValueError(
                f"data.seq_len is {seq_len}, data.val_sequences {val_sequences}; allowed: 1 or more"
            )
        self.seq_len = seq_len
        self.val_sequences = val_sequences

    @cached_property
    def splits(self) -> TokenSplits:
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Open the splits. Raises ValueError for one that is too short."""
        for split, tokens in self.splits.tokens.items():
            least = self.seq_len + 1 if split == "train" else 2  # an input and a target
            if len(tokens) < least:
                raise ValueError(
                    f"the split {split} of the data has {len(tokens)} tokens, allowed: {least} or"
                    f" more with data.seq_len {self.seq_len}; give more text"
                )

    def train_dataloader(self) -> DataLoader:
        dataset = TrainSequences(self.splits.tokens["train"], self.seq_len)
        return self.train_loader(dataset, SampleOrder(len(dataset), self.seed))

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(self.eval_windows("val"))

    def test_dataloader(self) -> DataLoader:
        return self.eval_loader(self.eval_windows("test"))

    def eval_windows(self, split: str) -> EvalWindows:
        """Return the windows of `split` that its loader reads. `val_sequences` limits those of
        val."""
        limit = self.val_sequences if split == "val" else None
        tokens = self.splits.tokens[split]
        return EvalWindows(tokens, self.seq_len, self.splits.token_bytes_V, limit)

    def unigram_bits_per_byte(self) -> float:
        """Return the bits per UTF-8 byte of a unigram model, which any trained model must beat.

        It counts the training tokens, each plus one, and is scored on the targets of a validation.
        """
        token_bytes_V = self.splits.token_bytes_V
        train = self.splits.tokens["train"]
        train_count_V = np.ones(len(token_bytes_V))
        for start in range(0, len(train), COUNT_CHUNK):
            chunk = train[start : start + COUNT_CHUNK]
            train_count_V += np.bincount(chunk, minlength=len(token_bytes_V))

        windows = self.eval_windows("val")
        target_count_V = np.zeros(len(token_bytes_V), np.int64)
        for i in range(len(windows)):
            np.add.at(target_count_V, windows.window(i)[1:], 1)
        bits_V = np.log2(train_count_V.sum()) - np.log2(train_count_V)
        return float(target_count_V @ bits_V / (target_count_V @ token_bytes_V))

    def identity(self) -> dict[str, Any]:
        return {"data": self.splits.content, "seed": self.seed, "seq_len": self.seq_len}


@dataclass(frozen=True)
class SyntheticTokens:
    """`length` pseudo-random ids below `vocab_size`, without a file or a tokenizer.

    stream: the split's number. Token t is a hash of (seed, stream, t), so any slice can be
    computed anywhere, in any order. All ids are equally likely and independent: there is nothing to
    learn, and the loss stays at ln V.
    """

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
    """Return pseudo-random numbers for a counter, by SplitMix64 (Steele, Lea, Flood 2014), a
    bijection of uint64."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SyntheticDataModule(SequenceDataModule):
    """Synthetic tokens: 65,536 sequences for training, and `val_sequences` (None: 64) each for
    validation and test.

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
        token_bytes_V = np.ones(self.vocab_size, np.int64)
        return TokenSplits(tokens, token_bytes_V, f"synthetic-{self.vocab_size}")
