"""The generation part of `bench inference`: with a cache and without, in one process.

    uncached      each token is a pass over the whole text so far; logits of its last token alone,
                  as with a cache
    operators     those of the blocks and the vocabulary's product, timed in place; the rest of a
                  step is norms, sums of residuals, masks, choosing tokens, and Python
    cache_limit   what a cache would gain on this machine if passes were operators alone: a step
                  reads as many weights for a few rows as a pass does for many, so it is far from
                  the ratio of their multiplications

All kinds run in turn, round after round, on the same prompts, and ratios are taken within a round.
The model has the quickstart's sizes and random weights; a document's end does not stop it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.load import SHIPPED, load_config
from scmoe.inference.generate import stream
from scmoe.inference.sampling import GREEDY, Stopping
from scmoe.moe.recorder import Recorder
from scmoe.moe.stream import dropless
from scmoe.planning.clock import CPU, in_turn, median, seconds
from scmoe.report import Report
from scmoe.training.assembly.model import build_model

TEXTS, PROMPT = 4, 32
RECORD_EVERY = 8  # the operators of one in so many passes without a cache are recorded
FIGURE_WORDS = {  # of the table, by the figure's name
    "cached_over_uncached": "without a cache over with one",
    "cache_limit": "the same of the operators alone",
    "decode_over_operators": "a decoding step over the sum of its operators",
    "tpot_ms": "a decoding step, ms",
    "tokens_per_s": "tokens/s",
    "ttft_ms": "first token, ms",
    "uncached_ms": "all texts without a cache, ms",
}
Kind = Callable[[], list[float]]


@dataclass(frozen=True)
class Generation:
    """What generation was measured to take: medians of the rounds.

    figures: by the names in FIGURE_WORDS. operators_ms: of a decoding step. tokens: new ones of a
    text.
    """

    texts: int
    prompt: int
    tokens: int
    rounds: int
    figures: dict[str, float]
    operators_ms: dict[str, float]

    def report(self) -> dict[str, Any]:
        """Return what JSON has of it."""
        sizes = {"texts": self.texts, "prompt": self.prompt, "tokens": self.tokens}
        return {**sizes, "rounds": self.rounds, **self.figures, "operators_ms": self.operators_ms}


def measure(rank: int, world_size: int, tokens: int, rounds: int) -> Generation:
    """Run in a process with one rank. tokens: new ones of each text.

    AssertionError: two kinds of generation differ in a token.
    """
    config = load_config(SHIPPED / "quickstart.yaml", [f"data.seq_len={PROMPT + tokens}"])
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(config.data.vocab_size, (TEXTS, PROMPT), generator=generator)
    steps_ms: list[dict[str, float]] = []  # the operators of each decoding step
    times = in_turn(generation_runs(model, ids_BS, tokens, steps_ms), rounds, warm_up=0)
    total_ms, tpot_ms, ttft_ms = times["cached"]
    over_operators, limit = times["recorded"]
    (uncached_ms,) = times["uncached"]
    figures = {
        "cached_over_uncached": uncached_ms / total_ms,
        "cache_limit": limit,
        "decode_over_operators": over_operators,
        "tpot_ms": tpot_ms,
        "tokens_per_s": TEXTS * 1e3 / tpot_ms,
        "ttft_ms": ttft_ms,
        "uncached_ms": uncached_ms,
    }
    operators_ms = {name: median([step[name] for step in steps_ms]) for name in steps_ms[0]}
    medians = {name: median(values) for name, values in figures.items()}
    return Generation(TEXTS, PROMPT, tokens, rounds, medians, operators_ms)


def generation_runs(
    model: Any, ids_BS: Tensor, tokens: int, steps_ms: list[dict[str, float]]
) -> dict[str, Kind]:
    """Return functions that generate: with a cache, without one, and with operators recorded.

    cached: returns the ms of all tokens, of a step and of the first token. uncached: the ms of all
    tokens. recorded: appends the times of each step's operators to `steps_ms`, and returns the time
    of a step over that of its operators, and the operators' time without a cache over that with
    one.
    """
    expected_BS = cached(model, ids_BS, tokens)[0]  # the first calls of a process are slower
    uncached(model, ids_BS, 2)
    recorded_lengths = range((tokens - 1) % RECORD_EVERY // 2, tokens, RECORD_EVERY)

    def with_cache() -> list[float]:
        _, times_ms, _ = cached(model, ids_BS, tokens)
        return [sum(times_ms), median(times_ms[1:]), times_ms[0]]

    def without() -> list[float]:
        texts: list[Tensor] = []
        taken_s = seconds(lambda: texts.append(uncached(model, ids_BS, tokens)))
        assert torch.equal(texts[0], expected_BS), "two kinds of generation differ in a token"
        return [1e3 * taken_s]

    def recorded_steps() -> list[float]:
        passes_ms = []
        with recorded(model) as recorder:
            _, times_ms, operators_ms = cached(model, ids_BS, tokens, recorder)
            for length in recorded_lengths:
                uncached(model, expected_BS[:, : ids_BS.shape[1] + length], 1)
                passes_ms.append(sum(taken_ms(recorder).values()))
        steps_ms.extend(operators_ms[1:])
        totals_ms = [sum(of_step.values()) for of_step in operators_ms]
        over_operators = [
            step_ms / total_ms
            for step_ms, total_ms in zip(times_ms[1:], totals_ms[1:], strict=True)
        ]
        return [median(over_operators), mean(passes_ms) / mean(totals_ms)]

    return {"cached": with_cache, "uncached": without, "recorded": recorded_steps}


@torch.inference_mode()  # as in `scmoe generate`
def cached(
    model: Any, ids_BS: Tensor, tokens: int, recorder: Recorder | None = None
) -> tuple[Tensor, list[float], list[dict[str, float]]]:
    """Return the texts [B, S + tokens], and times in ms: of each step and, if recorded, of its
    operators."""
    steps = stream(model, ids_BS.tolist(), Stopping(tokens), GREEDY)
    columns: list[Any] = []
    times_ms, operators_ms = [], []
    for _ in range(tokens):
        times_ms.append(1e3 * seconds(lambda: columns.append(next(steps).ids)))
        if recorder is not None:
            operators_ms.append(taken_ms(recorder))
    return torch.cat([ids_BS, torch.tensor(columns).T], 1), times_ms, operators_ms


def taken_ms(recorder: Recorder) -> dict[str, float]:
    """Return the times of the operators that are recorded, and forget them."""
    times_ms: dict[str, float] = {}
    for span in recorder.spans("forward"):
        times_ms[span.operator] = times_ms.get(span.operator, 0.0) + 1e3 * (span.end - span.start)
    recorder.marks.clear()
    return times_ms


@torch.inference_mode()
def uncached(model: Any, ids_BS: Tensor, tokens: int) -> Tensor:
    """Return the texts [B, S + tokens], written by passes over the whole text."""
    with dropless(model):
        for _ in range(tokens):
            last_B = torch.full((len(ids_BS),), ids_BS.shape[1] - 1)
            next_B1 = model(ids_BS, last_B=last_B).logits_BSV.argmax(-1)
            ids_BS = torch.cat([ids_BS, next_B1], 1)
    return ids_BS


@contextmanager
def recorded(model: Any) -> Iterator[Recorder]:
    """Record the times of the blocks' operators, and of the product with the vocabulary as
    `head`."""
    recorder = Recorder(CPU)
    model.head.forward = partial(recorder.around, "head", model.head.forward)
    for block in moe_blocks_of(model):
        block.run_as(block.schedule, block.moe.dispatcher, recorder)
    try:
        yield recorder
    finally:
        del model.head.forward
        for block in moe_blocks_of(model):
            block.run_as(block.schedule, block.moe.dispatcher)


def tables(report: dict[str, Any]) -> list[Report]:
    """Return the tables of `Generation.report`."""
    title = (
        "Generation in one process, {texts} texts, {prompt} + {tokens} tokens, medians of {rounds}"
        " rounds"
    ).format_map(report)
    figures = {words: {"value": report[name]} for name, words in FIGURE_WORDS.items()}
    operators = {name: {"ms": ms} for name, ms in report["operators_ms"].items()}
    return [
        Report(title, figures, {"": "{value:.3g}"}, "generation"),
        Report("Its decoding step", operators, {"ms": "{ms:.3f}"}, "operator"),
    ]
