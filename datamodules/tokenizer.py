"""Converts text to token ids and back without loss, by BPE over bytes.

A vocabulary is trained here (`bpe`), is that of GPT-2 (`gpt2`), or comes from a `tokenizer.json`.
All three become the same `tokenizers` object, so every token cache holds a `tokenizer.json`, and
reading it requires no network.

A file may be of either lossless kind: GPT-2's, where every byte is a letter, or LLaMA's
(SentencePiece), where a space is the letter "▁" and characters without a token become the tokens
<0x00> to <0xFF> of their bytes. LLaMA adds a space before every text and removes it when decoding;
here none is added, so that tokens stand for the text's bytes only.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    import tokenizers  # imported in functions: images and synthetic tokens need no tokenizer

GPT2_VOCABULARY = "openai-community/gpt2"  # at Hugging Face
END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>")  # its names in files: GPT-2, LLaMA 2, LLaMA 3
SPACE = "▁"  # SentencePiece's letter for a space
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's tokens of single bytes
PIECE_CHARS = 1 << 20  # a tokenizer requires about 100 bytes of memory per character
TRAIN_CHARS = 200_000_000  # more text hardly changes BPE's counts, but needs more memory


class Tokenizer:
    """A lossless tokenizer with a special token that ends a text. Encoding a text never gives this
    token.

    `vocab_size` is one more than the largest id; `end_of_text` is the special token's id,
    `end_token` its text.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", origin: str) -> None:
        self.origin = origin
        added = inner.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        ends = {token: special[token] for token in ENDS if token in special}
        if not ends:  # a token that is not special also stands for text that spells it out
            raise ValueError(
                f"data.tokenizer {origin} has none of the tokens {', '.join(ENDS)} as a special"
                " token; add one"
            )
        self._bytes: list[int] | None = None  # ids of BYTE_TOKENS, in a vocabulary of LLaMA's kind
        if getattr(inner.model, "byte_fallback", False):
            inner = _without_prefix(inner)
            self._bytes = [i for i in map(inner.token_to_id, BYTE_TOKENS) if i is not None]
            if len(self._bytes) < len(BYTE_TOKENS):
                raise ValueError(
                    f"data.tokenizer {origin} has {len(self._bytes)} of the 256 tokens <0x00> to"
                    " <0xFF>"
                )
        inner.encode_special_tokens = True  # a text that spells out "<|endoftext|>" is text
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.end_token, self.end_of_text = next(iter(ends.items()))
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `tokenizer.json`.

        Raises FileNotFoundError if it is missing, ValueError for another file.
        """
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ValueError(f"data.tokenizer {path} is not a tokenizer.json: {error}") from error
        return cls(inner, str(path))

    @property
    def digest(self) -> str:
        """A hash of the vocabulary: two are equal if every id means the same piece of text."""
        vocab = sorted(self._inner.get_vocab(with_added_tokens=True).items())
        return sha256(json.dumps(vocab).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        path.write_text(self._inner.to_str(), encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int64, without special tokens."""
        return np.array([i for piece in pieces(text) for i in self._encode(piece)], np.int64)

    def _encode(self, piece: str) -> list[int]:
        if self._bytes is None:
            return self._inner.encode(piece, add_special_tokens=False).ids
        # A "▁" in the text would be decoded as a space, so it is encoded by its bytes.
        letter = [self._bytes[byte] for byte in SPACE.encode()]
        ids = []
        for i, part in enumerate(piece.split(SPACE)):
            if i > 0:
                ids += letter
            ids += self._inner.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. The end of a document shows as `end_token`."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def require_room(self, vocab_size: int) -> None:
        """Raise ValueError if this tokenizer has more than `vocab_size` ids, those of the model."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"data.vocab_size is {vocab_size}, allowed: {self.vocab_size} or more, "
                f"the number of ids of data.tokenizer={self.origin}"
            )

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, int64 [V]; 0 for special tokens and unused
        ids."""
        added = self._inner.get_added_tokens_decoder()
        num_bytes_V = np.zeros(self.vocab_size, np.int64)
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            if i in added:
                num_bytes_V[i] = 0 if added[i].special else len(token.encode())
            elif self._bytes is None:
                num_bytes_V[i] = len(token)  # in GPT-2's kind every byte is one letter
            else:
                num_bytes_V[i] = len(token.replace(SPACE, " ").encode())
        if self._bytes is not None:
            num_bytes_V[self._bytes] = 1
        return num_bytes_V


def make_tokenizer(kind: str, vocab_size: int, train_texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names. `train_texts` are read for `bpe` only."""
    if kind == "gpt2":
        tokenizer = Tokenizer(_gpt2(), kind)
    elif kind == "bpe":
        tokenizer = Tokenizer(_train_bpe(train_texts, vocab_size), kind)
    else:
        tokenizer = Tokenizer.load(tokenizer_file(kind))
    tokenizer.require_room(vocab_size)
    return tokenizer


def tokenizer_file(kind: str) -> Path:
    """Return `kind` as the path of an existing file. Raises ValueError if there is none."""
    if not Path(kind).is_file():
        raise ValueError(
            f"data.tokenizer is {kind!r}; allowed: bpe, gpt2, or the path of an existing"
            " tokenizer.json"
        )
    return Path(kind)


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Yield pieces of `text` of about `size` characters, cut after line ends if there are any.

    Raises ValueError if it is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"a document is {text!r}, but every row must be a text")
    start = 0
    while start < len(text):
        line_end = text.rfind("\n", start, start + size) + 1
        stop = line_end if line_end and start + size < len(text) else start + size
        yield text[start:stop]
        start = stop


def _train_bpe(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def beginning() -> Iterator[str]:
        room = TRAIN_CHARS
        for piece in chain.from_iterable(map(pieces, texts)):
            if room <= 0:
                return
            yield piece
            room -= len(piece)

    inner = tokenizers.Tokenizer(models.BPE())
    # splits words as GPT-2 does
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(beginning(), trainer)
    return inner


def _gpt2() -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_pretrained(GPT2_VOCABULARY)
    except Exception as error:
        raise ValueError(
            "data.tokenizer gpt2 cannot be downloaded: save the tokenizer.json of"
            f" https://huggingface.co/{GPT2_VOCABULARY} and set data.tokenizer to its path"
        ) from error


def _without_prefix(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Return the tokenizer without the space that LLaMA's kind adds before a text, in both forms in
    which transformers writes it."""
    import tokenizers

    described = json.loads(inner.to_str())

    def parts(key: str, inside: str) -> list[dict]:
        part = described[key]
        if part is None:
            return []
        return part[inside] if part["type"] == "Sequence" else [part]

    normalizer = [part for part in parts("normalizer", "normalizers") if part["type"] != "Prepend"]
    decoder = [part for part in parts("decoder", "decoders") if part["type"] != "Strip"]
    for part in (*parts("pre_tokenizer", "pretokenizers"), *decoder):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    described["normalizer"] = {"type": "Sequence", "normalizers": normalizer}
    described["decoder"] = {"type": "Sequence", "decoders": decoder}
    return tokenizers.Tokenizer.from_str(json.dumps(described))
