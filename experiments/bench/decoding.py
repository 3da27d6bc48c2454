"""Generation: with a cache over without, a decoding step over its operators, and transformers'
GPT-2 beside ours.

    uncached      each token is a pass over the whole text so far; logits of its last token alone,
                  as with a cache
    operators     those of the blocks and the vocabulary's product, timed in place; the rest of a
                  step is norms, sums of residuals, masks, choosing tokens, and Python
    cache_limit   what a cache would gain on this machine if passes were operators alone: a step
                  reads as many weights for a few rows as a pass does for many, so it is far from
                  the ratio of their multiplications
    transformers  `generate` of its GPT-2, which has the weights of our dense model

All kinds run in turn, round after round, on the same prompts, and ratios are taken within a round.
The models have the quickstart's sizes and random weights; a document's end does not stop them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from experiments.engine.clock import CPU, in_turn, middle, seconds
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.inference.generate import generate, stream
from scmoe.inference.sampling import GREEDY, Stopping
from scmoe.moe.operators import Recorder
from scmoe.moe.stream import dropless
from scmoe.parallel.mesh import ParallelContext
from scmoe.report import Report
from scmoe.runs.hf_folder import hf_config, renamed
from scmoe.training.assembly.model import build_model

CONFIG = "configs/quickstart.yaml"
USUAL = (4, 32, 256)  # batch, prompt, new tokens for which the first limit holds
EVERY = 8  # the operators of one in so many passes without a cache are recorded
ROWS = {  # of the table: words, limit
    "cached_over_uncached": ("without a cache over with one", "at least 9 for 4 texts"),
    "cache_limit": ("the same of the operators alone", ""),
    "decode_over_operators": ("a decoding step over the sum of its operators", "at most 1.15"),
    "over_transformers": ("our dense GPT-2 over transformers', whole texts", "at most 1.2"),
    "tpot_ms": ("a decoding step, ms", ""),
    "tokens_per_s": ("tokens/s", ""),
    "ttft_ms": ("first token, ms", ""),
    "uncached_ms": ("texts without a cache, ms", ""),
    "dense_ms": ("texts of our dense GPT-2, ms", ""),
    "transformers_ms": ("texts of transformers' GPT-2, ms", ""),
}
Kind = Callable[[], list[float]]


def bench_generation(
    batches: Sequence[int], prompt: int, tokens: int, threads: int, rounds: int
) -> dict[str, Any]:
    """Print tables and return medians, of the last batch size and of each. It requires
    transformers.

    Raises AssertionError where two kinds of generation differ in a token."""
    torch.set_num_threads(threads)
    config = load(CONFIG, [f"data.seq_len={prompt + tokens}"])
    model = build_model(config, ParallelContext()).eval()
    operators: dict[int, list[dict[str, float]]] = {
        batch: [] for batch in batches
    }  # ms, of each decoding step
    dense_kinds = beside_transformers(
        replace(config, moe=replace(config.moe, architecture="dense"))
    )
    kinds: dict[tuple[int, str], Kind] = {}
    for batch in batches:
        ids_BS = torch.randint(
            config.data.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)
        )
        of_batch = cache_kinds(model, ids_BS, tokens, operators[batch]) | dense_kinds(
            ids_BS, tokens
        )
        kinds |= {(batch, name): kind for name, kind in of_batch.items()}
    numbers = in_turn(kinds, rounds, warm_up=0)

    def of(batch: int) -> dict[str, float]:
        total_ms, tpot_ms, ttft_ms = numbers[batch, "cached"]
        over_operators, limit = numbers[batch, "recorded"]
        uncached_ms, dense_ms, transformers_ms = (
            numbers[batch, n][0] for n in ("uncached", "dense", "transformers")
        )
        found = {
            "cached_over_uncached": uncached_ms / total_ms,
            "cache_limit": limit,
            "decode_over_operators": over_operators,
            "over_transformers": dense_ms / transformers_ms,
            "tpot_ms": tpot_ms,
            "tokens_per_s": batch * 1e3 / tpot_ms,
            "ttft_ms": ttft_ms,
            "uncached_ms": uncached_ms,
            "dense_ms": dense_ms,
            "transformers_ms": transformers_ms,
        }
        return {name: middle(values) for name, values in found.items()}

    by_batch = {batch: of(batch) for batch in batches}
    show(by_batch, operators, prompt, tokens)
    return by_batch[batches[-1]] | {"by_batch": by_batch}


def cache_kinds(
    model: Any, ids_BS: Tensor, tokens: int, operators: list[dict[str, float]]
) -> dict[str, Kind]:
    """Return generation with a cache, without, and with its operators recorded. The first two
    return times in ms: of all, a step, the first token; of all. The third returns a step over its
    operators, whose times it appends to `operators`, and the operators of all passes without a
    cache over those with one."""
    expected_BS = cached(model, ids_BS, tokens)[0]  # the first calls of a process are slower
    uncached(model, ids_BS, 2)
    some = range((tokens - 1) % EVERY // 2, tokens, EVERY)

    def with_cache() -> list[float]:
        _, steps_ms, _ = cached(model, ids_BS, tokens)
        return [sum(steps_ms), middle(steps_ms[1:]), steps_ms[0]]

    def without() -> list[float]:
        return [timed_ms(lambda: uncached(model, ids_BS, tokens), expected_BS)]

    def recorded_steps() -> list[float]:
        longer = []
        with recorded(model) as recorder:
            _, steps_ms, own = cached(model, ids_BS, tokens, recorder)
            for n in some:
                uncached(model, expected_BS[:, : ids_BS.shape[1] + n], 1)
                longer.append(sum(taken_ms(recorder).values()))
        operators.extend(own[1:])
        totals_ms = [sum(of_step.values()) for of_step in own]
        over_operators = [
            ms / total_ms for ms, total_ms in zip(steps_ms[1:], totals_ms[1:], strict=True)
        ]
        return [middle(over_operators), mean(longer) / mean(totals_ms)]

    return {"cached": with_cache, "uncached": without, "recorded": recorded_steps}


def beside_transformers(config: Config) -> Callable[[Tensor, int], dict[str, Kind]]:
    """Return a function (prompts, tokens) -> `generate` of our dense model and of transformers'
    with equal weights.

    Both return the time of all tokens in ms. config: of a dense model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = build_model(config, ParallelContext()).eval()
    content = hf_config(config, None)
    theirs = GPT2LMHeadModel(GPT2Config(**content)).eval()
    weights = {
        name: w
        for own, p in ours.named_parameters()
        for name, w in renamed(content, own, p.detach())
    }
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (
        "tied to the embedding; all others are set"
    )

    def kinds(ids_BS: Tensor, tokens: int) -> dict[str, Kind]:
        def write_ours() -> Tensor:
            written = generate(ours, ids_BS.tolist(), Stopping(tokens), GREEDY)
            return torch.cat([ids_BS, torch.tensor([ids for ids, _ in written])], 1)

        def write_theirs(new: int = tokens) -> Tensor:
            mask_BS = torch.ones_like(ids_BS)
            return theirs.generate(
                ids_BS, attention_mask=mask_BS, max_new_tokens=new, do_sample=False
            )

        expected_BS = write_ours()
        write_theirs(2)
        return {
            "dense": lambda: [timed_ms(write_ours, expected_BS)],
            "transformers": lambda: [timed_ms(write_theirs, expected_BS)],
        }

    return kinds


def timed_ms(write: Callable[[], Tensor], expected_BS: Tensor) -> float:
    """Return the time of one call. Raises AssertionError where it returns other tokens than
    expected."""
    texts: list[Tensor] = []
    ms = 1e3 * seconds(lambda: texts.append(write()))
    assert torch.equal(texts[0], expected_BS), "two kinds of generation differ in a token"
    return ms


@torch.inference_mode()  # as in `scmoe generate`
def cached(
    model: Any, ids_BS: Tensor, tokens: int, recorder: Recorder | None = None
) -> tuple[Tensor, list[float], list[dict[str, float]]]:
    """Return the texts [B, S + tokens], and the times in ms of each step and, if it is recorded, of
    its operators."""
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
    own: dict[str, float] = {}
    for span in recorder.spans("forward"):
        own[span.operator] = own.get(span.operator, 0.0) + 1e3 * (span.end - span.start)
    recorder.marks.clear()
    return own


@torch.inference_mode()
def uncached(model: Any, ids_BS: Tensor, tokens: int) -> Tensor:
    with dropless(model):
        for _ in range(tokens):
            last_B = torch.full((len(ids_BS),), ids_BS.shape[1] - 1)
            next_B1 = model(ids_BS, last_B=last_B).logits_BSV.argmax(-1)
            ids_BS = torch.cat([ids_BS, next_B1], 1)
    return ids_BS


@contextmanager
def recorded(model: Any) -> Iterator[Recorder]:
    """Note the times of the blocks' operators, and of the product with the vocabulary as `head`."""
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


def show(
    by_batch: dict[int, dict[str, float]],
    operators: dict[int, list[dict[str, float]]],
    prompt: int,
    tokens: int,
) -> None:
    medians = {
        name: {
            f"batch {batch}": middle([own[name] for own in steps])
            for batch, steps in operators.items()
        }
        for name in next(iter(operators.values()))[0]
    }
    columns = {f"batch {batch}": f"{{batch {batch}:.3f}}" for batch in by_batch}
    Report("Decoding, in place, median ms", medians, columns, "operator of a step").show()
    rows = {
        words: {f"batch {batch}": own[name] for batch, own in by_batch.items()} | {"limit": limit}
        for name, (words, limit) in ROWS.items()
    }
    if (max(by_batch), prompt, tokens) != USUAL:
        rows[ROWS["cached_over_uncached"][0]]["limit"] = ""
    columns = {f"batch {batch}": f"{{batch {batch}:.3g}}" for batch in by_batch} | {
        "limit": "{limit}"
    }
    Report(f"{prompt} + {tokens} tokens", rows, columns, "generation").show()
