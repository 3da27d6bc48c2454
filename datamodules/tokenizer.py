"""Byte-level BPE: text to token ids and back, without loss.

A vocabulary is trained here (`bpe`), is GPT-2's (`gpt2`), or comes from a `tokenizer.json`. All three end up as the
same `tokenizers` object, so a token cache always holds one `tokenizer.json`, and reading it needs neither tiktoken nor
a network. Bits per byte needs to know how many bytes a token stands for: that is `Tokenizer.token_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 1 << 20  # a tokenizer holds about 100 bytes per character it works on
TRAIN_CHARS = 200_000_000  # BPE's counts hardly change beyond this much text, its memory does


class Tokenizer:
    """A lossless tokenizer with one special token, `<|endoftext|>`, which no text is ever encoded to.

    `vocab_size` is one more than the largest id; `end_of_text` is the special token's id.
    """

    def __init__(self, inner: tokenizers.Tokenizer, origin: str) -> None:
        end = inner.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"data.tokenizer {origin} has no token {END_OF_TEXT}; add it as a special token")
        inner.encode_special_tokens = True  # a text that spells out "<|endoftext|>" is text
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.end_of_text: int = end
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`. FileNotFoundError where there is none."""
        return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")), str(path))

    def save(self, path: Path) -> None:
        path.write_text(self._inner.to_str(), encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int64, without special tokens."""
        parts = [self._inner.encode(piece, add_special_tokens=False).ids for piece in pieces(text)]
        return np.concatenate([np.empty(0, np.int64), *(np.asarray(ids, np.int64) for ids in parts)])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; the end of a document shows as `<|endoftext|>`."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def require_room(self, vocab_size: int) -> None:
        """ValueError where a model with `vocab_size` ids could not take all of this tokenizer's."""
        if self.vocab_size > vocab_size:
            raise ValueError(f"data.vocab_size is {vocab_size}; this tokenizer needs at least {self.vocab_size}")

    def token_bytes(self) -> np.ndarray:
        """Returns int64 [V]: the UTF-8 bytes each id stands for; 0 for special tokens and unused ids."""
        added = self._inner.get_added_tokens_decoder()
        num_bytes_V = np.zeros(self.vocab_size, np.int64)
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            if i not in added:
                num_bytes_V[i] = len(token)  # byte-level BPE spells every byte as one letter
            elif not added[i].special:
                num_bytes_V[i] = len(token.encode())
        return num_bytes_V


def make_tokenizer(kind: str, vocab_size: int, train_texts: Iterable[str]) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names; `train_texts` are read for `bpe` only.

    ValueError where the vocabulary is larger than `vocab_size`, which is the model's.
    """
    if kind == "bpe":
        tokenizer = Tokenizer(_train_bpe(train_texts, vocab_size), kind)
    elif kind == "gpt2":
        tokenizer = Tokenizer(_gpt2(), kind)
    else:
        tokenizer = Tokenizer.load(tokenizer_file(kind))
    tokenizer.require_room(vocab_size)
    return tokenizer


def tokenizer_file(kind: str) -> Path:
    """Returns `kind` as the path of an existing file. ValueError where it is none."""
    if not Path(kind).is_file():
        raise ValueError(f"data.tokenizer is {kind!r}; allowed: bpe, gpt2, or the path of an existing tokenizer.json")
    return Path(kind)


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cuts `text` into pieces of about `size` characters, after line ends where there are any."""
    start = 0
    while start < len(text):
        line_end = text.rfind("\n", start, start + size) + 1
        stop = line_end if line_end and start + size < len(text) else start + size
        yield text[start:stop]
        start = stop


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    if vocab_size < 257:
        raise ValueError(f"data.vocab_size is {vocab_size}; bpe needs at least 257: all bytes and {END_OF_TEXT}")

    def beginning() -> Iterator[str]:
        room = TRAIN_CHARS
        for text in texts:
            for piece in pieces(text):
                if room <= 0:
                    return
                yield piece
                room -= len(piece)

    inner = _byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(beginning(), trainer)
    return inner


def _gpt2() -> tokenizers.Tokenizer:
    if find_spec("tiktoken") is None:
        raise ModuleNotFoundError("data.tokenizer gpt2 needs tiktoken: install the extra scmoe[owt]")
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab) if i != encoding.eot_token}
    return from_ranks(ranks)


def from_ranks(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """Builds the tokenizer of a table token -> rank, as tiktoken has it: ids are ranks, the end of text comes last.

    `tokenizers` wants each token's last merge by name. It is what BPE leaves of the token's bytes when only the merges
    that came before it are known.
    """
    letters = byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            assert pairs[best] < rank, f"token {rank} is not a merge of earlier tokens"
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((spell[parts[0]], spell[parts[1]]))
    inner = _byte_level(models.BPE({spell[token]: rank for token, rank in ranks.items()}, merges))
    inner.add_special_tokens([END_OF_TEXT])
    return inner


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """GPT-2's splitting into words, and every byte a letter."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    return inner


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it prints, else the next letter from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]
