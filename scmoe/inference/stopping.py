"""Says where a text ends: after so many tokens, at a stop token, or at a stop string, which may cross tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["length", "stop_token", "stop_string"]


@dataclass(frozen=True)
class Stopping:
    """max_tokens: new tokens of a text at most. tokens: ids that end it. strings: texts that end it; they require
    `decode`, which turns ids into text. Raises ValueError for other values."""

    max_tokens: int
    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, allowed: 1 or more")
        if "" in self.strings:
            raise ValueError("a stop string is empty, allowed: one character or more")
        if self.strings and self.decode is None:
            raise ValueError("stop strings are given without `decode`, allowed: with it; pass tokenizer.decode")

    def reason(self, ids: Sequence[int]) -> Reason | None:
        """Returns why a text with these new tokens ends; None: it goes on. Call it after each token."""
        if ids[-1] in self.tokens:
            return "stop_token"
        if self.strings and self.decode is not None:
            # A token has a byte or more, a character 4 bytes or less: a string that ends now began within this tail.
            tail = self.decode(ids[-4 * max(map(len, self.strings)) - 4 :])
            if any(string in tail for string in self.strings):
                return "stop_string"
        return "length" if len(ids) >= self.max_tokens else None

    def text(self, ids: Sequence[int], ended: bool = True) -> str:
        """Returns the text of new tokens, without the stop token and before the first stop string.

        ended: False leaves out the end of it that later tokens could change: half a character, or what may become a
        stop string."""
        assert self.decode is not None
        text = self.decode([i for i in ids if i not in self.tokens])
        for string in self.strings:
            text = text.partition(string)[0]
        if ended:
            return text
        text = text.rstrip("\ufffd")
        return text[: len(text) - max((overlap(text, string) for string in self.strings), default=0)]


def overlap(text: str, string: str) -> int:
    """Returns the length of the longest end of `text` with which `string` begins."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
