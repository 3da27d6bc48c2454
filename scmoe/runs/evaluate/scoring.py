"""Scores of a model on rank 0: the log-likelihood of a text or of an answer, and the loss of the
whole test split.

Sequences are usually longer than the model's context, so windows slide over them. Each token is
scored once, in a window that shows the model at least `context - stride` of the tokens before it,
or all of them where there are fewer.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from scmoe.config.leaves import ConfigError
from scmoe.datamodules.positioned import IGNORE, PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.parallel.mesh import Mesh
from scmoe.report import console, say
from scmoe.training.modules import cross_entropy_sum

# Tokens of a batch, padding included. With a vocabulary of 50,000 its logits take 0.4 GB.
BATCH_TOKENS = 2048
TEST_SPLIT = "test split"
END, TAKE_PASS, GO_ON = range(3)  # what rank 0 announces
GO_ON_S = 1.0  # between announcements of the last kind
T = TypeVar("T")
# Computes the model's output for (inputs, mask, and what else it reads). Its first entry is the
# logits.
Forward = Callable[..., Any]


def run_on_rank_zero(
    work: Callable[[Forward], T], model: Forward, padding: tuple[Tensor, Tensor], mesh: Mesh
) -> T | None:
    """Return work(forward) on rank 0, and None on the others. Every rank must call it.

    Every forward pass needs all ranks of an expert-parallel group. Rank 0 announces each pass, and
    the others take part in it with a batch of padding alone. Padding is routed nowhere, so the
    experts get rank 0's rows and no others: products are those of one process.

    padding: inputs and mask of the smallest batch without any real sample. An error of `work` is
    raised on rank 0, and the other ranks return. Between passes `work` may take longer than a
    collective's timeout, so a thread of rank 0 announces at intervals that it goes on.
    """
    if mesh.rank != 0:
        while (announced := _announce(mesh)) != END:
            if announced == TAKE_PASS:
                model(*padding)
        return None

    others_wait = True  # for the next announcement
    announcing = threading.Lock()
    ended = threading.Event()

    def go_on() -> None:
        with suppress(RuntimeError):  # a rank has died: the next announcement raises the same error
            while not ended.wait(GO_ON_S):
                with announcing:
                    if others_wait and not ended.is_set():
                        _announce(mesh, GO_ON)

    def forward(inputs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        nonlocal others_wait
        with announcing:
            _announce(mesh, TAKE_PASS)
            others_wait = False
            output = model(inputs, mask, *rest)
            others_wait = True
        return output

    if mesh.world_size > 1:
        threading.Thread(target=go_on, name="go-on", daemon=True).start()
    try:
        return work(forward)
    finally:
        with announcing:
            ended.set()
            if others_wait:  # else the others are inside a pass and would not receive it
                _announce(mesh, END)


def _announce(mesh: Mesh, what: int = END) -> int:
    """Return rank 0's `what` on every rank: END, TAKE_PASS or GO_ON."""
    if mesh.world_size == 1:
        return what
    announced = torch.tensor([what], dtype=torch.uint8)
    dist.broadcast(announced, src=0, group=mesh.control_group)
    return int(announced)


class Window(NamedTuple):
    """The model reads tokens [start : stop - 1] and is scored on tokens [first : stop]."""

    start: int
    first: int
    stop: int


class Score(NamedTuple):
    """The score of some tokens.

    log_likelihood: in nats. greedy: each scored token was the likeliest.
    """

    log_likelihood: float
    num_tokens: int
    greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Score sequences of token ids. context: tokens that the model reads at most."""

    forward: Forward
    context: int
    device: torch.device

    def __call__(
        self,
        sequences: Sequence[tuple[np.ndarray, int]],
        stride: int | None = None,
        part: str = "sequences",
    ) -> list[Score]:
        """Return a score for each (ids, first): that of ids[first:], given what is before.

        first: 1 or more. stride: tokens that a further window scores at most; None: the whole
        context, the fewest windows.
        """
        windows = [
            (i, window)
            for i, (ids, first) in enumerate(sequences)
            for window in scored_windows(len(ids), first, self.context, stride or self.context)
        ]
        log_likelihoods = np.zeros(len(sequences))
        greedy = np.ones(len(sequences), bool)
        with progress_counter(part, len(windows)) as advance:
            for batch in batches(windows, lambda pair: pair[1].stop - pair[1].start):
                ids_of_batch = [sequences[i][0] for i, _ in batch]
                nats_B, likeliest_B = self.score(ids_of_batch, [window for _, window in batch])
                for (i, _), nats, likeliest in zip(batch, nats_B, likeliest_B, strict=True):
                    log_likelihoods[i] -= nats
                    greedy[i] &= likeliest
                advance(len(batch))
        return [
            Score(float(log_likelihoods[i]), len(ids) - first, bool(greedy[i]))
            for i, (ids, first) in enumerate(sequences)
        ]

    def score(
        self, ids: Sequence[np.ndarray], windows: Sequence[Window]
    ) -> tuple[list[float], list[bool]]:
        """Return for one window of each sequence the nats of its scored tokens, and whether all are
        the likeliest."""
        longest = max(window.stop - window.start for window in windows) - 1
        inputs_BS = torch.zeros(len(ids), longest, dtype=torch.int64)
        labels_BS = torch.full_like(inputs_BS, IGNORE)
        mask_BS = torch.zeros_like(inputs_BS, dtype=torch.bool)
        for row, (tokens, (start, first, stop)) in enumerate(zip(ids, windows, strict=True)):
            length = stop - 1 - start
            scored = torch.from_numpy(tokens[first:stop])
            inputs_BS[row, :length] = torch.from_numpy(tokens[start : stop - 1])
            labels_BS[row, first - 1 - start : length] = scored
            mask_BS[row, :length] = True

        labels_BS = labels_BS.to(self.device)
        logits_BSV = self.forward(inputs_BS.to(self.device), mask_BS.to(self.device))[0]
        wide_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
        nats_BS = F.cross_entropy(wide_BSV.mT, labels_BS, ignore_index=IGNORE, reduction="none")
        likeliest_BS = (logits_BSV.argmax(-1) == labels_BS) | (labels_BS == IGNORE)
        return nats_BS.double().sum(1).tolist(), likeliest_BS.all(1).tolist()


def scored_windows(num_tokens: int, first: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows that score the tokens from `first` on, each once.

    The first window reaches as far as the context does from the start of the text; each further one
    scores up to `stride` tokens and shows the tokens before them for as long as the context allows.
    """
    while first < num_tokens:
        stop = min(num_tokens, max(first + stride, context + 1))
        yield Window(max(0, stop - 1 - context), first, stop)
        first = stop


def batches(items: Iterable[T], length: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """Yield batches of about BATCH_TOKENS tokens, padding included.

    The longest items come first, so that there is little padding.
    """
    ordered = sorted(items, key=length, reverse=True)
    start = 0
    while start < len(ordered):
        size = max(1, BATCH_TOKENS // length(ordered[start]))
        yield ordered[start : start + size]
        start += size


def score_test_split(scorer: Scorer, data: PositionedDataModule) -> dict[str, Any]:
    """Return the loss of the test split in nats per token (image), and bits per byte of text or
    accuracy of images.

    It is computed as a rank computes a validation: the windows of a text do not overlap, and
    experts have the run's own capacity. Images have two splits: there the test split is the one of
    validation, whole.
    """
    is_text = isinstance(data, SequenceDataModule)
    device = scorer.device
    nats = 0.0
    hits = 0
    targets = 0
    num_bytes = 0
    batches_of_split = data.test_dataloader()
    with progress_counter(f"loss of the {TEST_SPLIT}", len(batches_of_split)) as advance:
        for batch in batches_of_split:
            labels = batch["labels"]
            if is_text:
                inputs, mask = batch["input_ids"], batch["padding_mask"]
                num_bytes += int(batch["num_bytes"].sum())
            else:
                inputs, mask = batch["images"], labels != IGNORE
            logits_NC = scorer.forward(inputs.to(device), mask.to(device))[0].flatten(0, -2)
            labels_N = labels.flatten().to(device)
            nats += cross_entropy_sum(logits_NC, labels_N).item()
            hits += int((logits_NC.argmax(-1) == labels_N).sum())
            targets += int((labels_N != IGNORE).sum())
            advance(1)

    loss = nats / targets
    if is_text:
        return {
            "split": "test",
            "loss": loss,
            "tokens": targets,
            "bits_per_byte": nats / num_bytes / math.log(2),
        }
    return {"split": "val", "loss": loss, "images": targets, "accuracy": hits / targets}


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    The first token is not scored. It is the end of text, as before each document, if the tokenizer
    has one.
    """

    name: str
    ids: np.ndarray


def open_text(data: SequenceDataModule, file: Path | None) -> Text:
    """Return the test split (of synthetic tokens too), or a UTF-8 file as one document.

    Raises ConfigError if the file cannot be read, or has no words.
    """
    test = np.asarray(data.splits.tokens["test"][:], np.int64)
    if not isinstance(data, TextDataModule):
        return Text(TEST_SPLIT, test)
    end = data.tokenizer.end_of_text
    if file is None:
        return Text(TEST_SPLIT, np.r_[end, test])

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--text is {str(file)!r}, which cannot be read as UTF-8 text: {error}"
        ) from error
    if not text.strip():
        raise ConfigError(f"--text is {str(file)!r}, which has no words. Give another file.")
    return Text(str(file), np.r_[end, data.tokenizer.encode(text)])


def score_text(
    scorer: Scorer, text: Text, stride: int, token_bytes_V: np.ndarray
) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte of a text. Every token is scored once, dropless.

    stride: tokens that a window scores; it shows at least context - stride tokens before each.
    """
    (score,) = scorer([(text.ids, 1)], stride, f"perplexity of {text.name}")
    loss = -score.log_likelihood / score.num_tokens
    num_bytes = int(token_bytes_V[text.ids[1:]].sum())
    return {
        "text": text.name,
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": -score.log_likelihood / num_bytes / math.log(2),
        "tokens": score.num_tokens,
        "window": scorer.context,
        "stride": stride,
    }


@contextmanager
def progress_counter(part: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is called with each number of further items that are done. It shows how
    far an evaluation is, on standard error: a bar on a terminal, elsewhere a line for each part.

    total: of the items. part: what they are items of, in words.
    """
    screen = console()
    if not screen.is_terminal:
        say(part)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(part, total=total))
