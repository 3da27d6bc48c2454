"""The text of an evaluation: the test split of a run, or a file; its perplexity by a sliding window."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scmoe.config.leaves import ConfigError
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.runs.evaluate.scoring import Scorer

TEST_SPLIT = "test split"


@dataclass(frozen=True)
class Text:
    """A text as tokens. The first is not scored: the end of text, as before each document, where there is one."""

    name: str
    ids: np.ndarray
    documents: list[str]


def open_text(data: SequenceDataModule, file: Path | None) -> Text:
    """Return the test split (of synthetic tokens too), or a UTF-8 file as one document.

    ConfigError: the file cannot be read, or has no words.
    """
    test = np.asarray(data.splits.tokens["test"][:], np.int64)
    if not isinstance(data, TextDataModule):
        return Text(TEST_SPLIT, test, [])
    end = data.tokenizer.end_of_text
    if file is None:
        documents = (part[part != end] for part in np.split(test, np.flatnonzero(test == end) + 1))
        return Text(TEST_SPLIT, np.r_[end, test], [data.tokenizer.decode(part) for part in documents])
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text is {str(file)!r}, allowed: a file of UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError(f"--text is {str(file)!r}, allowed: a file with words in it")
    return Text(str(file), np.r_[end, data.tokenizer.encode(text)], [text])


def score_text(scorer: Scorer, text: Text, stride: int, token_bytes_V: np.ndarray) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte of a text. Every token is scored once, dropless.

    stride: tokens that a window scores; it shows at least context - stride tokens before each.
    """
    (score,) = scorer([(text.ids, 1)], stride)
    loss, num_bytes = -score.log_likelihood / score.num_tokens, int(token_bytes_V[text.ids[1:]].sum())
    return {
        "text": text.name,
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": -score.log_likelihood / num_bytes / math.log(2),
        "tokens": score.num_tokens,
        "window": scorer.context,
        "stride": stride,
    }
