"""Generation with a cache over generation without one, and a decoding step over its operators' own times.

    uncached    each token is a pass over the whole text so far; logits of its last token alone, as with a cache
    operators   those of the blocks and the vocabulary's product, timed in place; the rest of a step is norms, sums of
                routers, masks, choosing tokens, and Python

Both kinds run in turn, round after round, on texts of the same greedy tokens, and ratios are taken within a round. The
model has the quickstart's sizes and random weights; a document's end does not stop it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from scmoe.blocks.moe_block import MoEBlock
from scmoe.config.load import load
from scmoe.inference.generate import stream
from scmoe.inference.sampling import GREEDY
from scmoe.inference.stopping import Stopping
from scmoe.moe.operators import Mark, Recorder
from scmoe.moe.stream import dropless
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model

CONFIG = "configs/quickstart.yaml"


def bench_generation(batch: int, prompt: int, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Print a table and return medians. Raises AssertionError where the two kinds of generation differ in a token."""
    torch.set_num_threads(threads)
    config = load(CONFIG, [f"data.seq_len={prompt + tokens}"])
    model = build_model(config, ParallelContext()).eval()
    ids_BS = torch.randint(config.data.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    cached(model, ids_BS, min(tokens, 8))  # the first calls of a process are slower
    uncached(model, ids_BS, 2)
    found: list[dict[str, float]] = []
    operators_ms: list[dict[str, float]] = []  # of each decoding step
    for _ in range(rounds):
        written_BS, steps_ms = cached(model, ids_BS, tokens)
        begun = time.perf_counter()
        assert torch.equal(uncached(model, ids_BS, tokens), written_BS), "the cache changes a token"
        uncached_ms = 1e3 * (time.perf_counter() - begun)
        of_round: list[dict[str, float]] = []
        with recorded(model) as recorder:
            _, recorded_ms = cached(model, ids_BS, tokens, recorder, of_round)
        over = [step / sum(own.values()) for step, own in zip(recorded_ms[1:], of_round[1:], strict=True)]
        operators_ms += of_round[1:]
        ratios = {"cached_over_uncached": uncached_ms / sum(steps_ms), "decode_over_operators": median(over)}
        found.append({**ratios, "tpot_ms": median(steps_ms[1:]), "ttft_ms": steps_ms[0], "uncached_ms": uncached_ms})
    result = {name: median([one[name] for one in found]) for name in found[0]}
    table = Table(Column("operator of a step"), Column("ms", justify="right"), title="Decoding, in place, median")
    for name in operators_ms[0]:
        table.add_row(name, f"{median([own[name] for own in operators_ms]):.3f}")
    Console(stderr=True, width=100).print(table, show(result, batch, prompt, tokens))
    return result


def cached(
    model: Any, ids_BS: Tensor, tokens: int, recorder: Recorder | None = None, operators_ms: list[Any] | None = None
) -> tuple[Tensor, list[float]]:
    """Return the texts [B, S + tokens] and the time of each step in ms; add what was recorded of it to operators_ms."""
    steps, columns, times_ms = stream(model, ids_BS.tolist(), Stopping(tokens), GREEDY), [], []
    for _ in range(tokens):
        begun = time.perf_counter()
        columns.append(torch.tensor(next(steps).ids))
        times_ms.append(1e3 * (time.perf_counter() - begun))
        if recorder is not None and operators_ms is not None:
            own: dict[str, float] = {}
            for span in recorder.spans("forward"):
                own[span.operator] = own.get(span.operator, 0.0) + 1e3 * (span.end - span.start)
            operators_ms.append(own)
            recorder.marks.clear()
    return torch.cat([ids_BS, torch.stack(columns, 1)], 1), times_ms


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
    recorder = Recorder(torch.device("cpu"))

    def note(begins: bool) -> None:
        recorder.marks.append(Mark("head", "forward", begins, recorder.now()))

    blocks = [block for block in model.blocks if isinstance(block, MoEBlock)]
    before = model.head.register_forward_pre_hook(lambda *_: note(True))
    after = model.head.register_forward_hook(lambda *_: note(False))
    for block in blocks:
        block.run_as(block.schedule, block.moe.dispatcher, recorder)
    try:
        yield recorder
    finally:
        for block in blocks:
            block.run_as(block.schedule, block.moe.dispatcher)
        before.remove()
        after.remove()


def show(result: dict[str, float], batch: int, prompt: int, tokens: int) -> Table:
    table = Table(Column("generation"), Column("median", justify="right"), Column("limit", justify="right"))
    per_s, usual = batch * 1e3 / result["tpot_ms"], (batch, prompt, tokens) == (4, 32, 256)  # for which the limit holds
    for what, value, limit in (
        (
            f"without a cache over with one, {batch} x ({prompt} + {tokens}) tokens",
            "cached_over_uncached",
            "at least 9" if usual else "",
        ),
        ("a decoding step over the sum of its operators", "decode_over_operators", "at most 1.3"),
        (f"time of a decoding step in ms ({per_s:.0f} tokens/s)", "tpot_ms", ""),
        ("time to the first token in ms", "ttft_ms", ""),
    ):
        table.add_row(what, f"{result[value]:.3g}", limit)
    return table
