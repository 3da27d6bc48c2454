"""Generation with a cache over generation without one, and a decoding step over its operators' own times.

    uncached    each token is a pass over the whole text so far; logits of its last token alone, as with a cache
    operators   those of the blocks and the vocabulary's product, timed in place; the rest of a step is norms, sums of
                routers, masks, choosing tokens, and Python

Both kinds run in turn, round after round, on texts of the same greedy tokens, and ratios are taken within a round. The
model has the quickstart's sizes and random weights; a document's end does not stop it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.load import load
from scmoe.experiments.engine.clock import CPU, in_turn, middle, seconds
from scmoe.experiments.engine.report import Report
from scmoe.inference.generate import stream
from scmoe.inference.sampling import GREEDY
from scmoe.inference.stopping import Stopping
from scmoe.moe.operators import Mark, Recorder
from scmoe.moe.stream import dropless
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model

CONFIG = "configs/quickstart.yaml"
NUMBERS = ("cached_over_uncached", "decode_over_operators", "tpot_ms", "ttft_ms", "uncached_ms")


def bench_generation(batch: int, prompt: int, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Print tables and return medians. Raises AssertionError where the two kinds of generation differ in a token."""
    torch.set_num_threads(threads)
    config = load(CONFIG, [f"data.seq_len={prompt + tokens}"])
    model = build_model(config, ParallelContext()).eval()
    ids_BS = torch.randint(config.data.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    cached(model, ids_BS, min(tokens, 8))  # the first calls of a process are slower
    uncached(model, ids_BS, 2)
    operators_ms: list[dict[str, float]] = []  # of each decoding step

    def a_round() -> list[float]:
        written_BS, steps_ms, _ = cached(model, ids_BS, tokens)

        def again() -> None:
            assert torch.equal(uncached(model, ids_BS, tokens), written_BS), "the cache changes a token"

        uncached_ms = 1e3 * seconds(again)
        with recorded(model) as recorder:
            _, recorded_ms, own = cached(model, ids_BS, tokens, recorder)
        operators_ms.extend(own[1:])
        over = [ms / sum(of_step.values()) for ms, of_step in zip(recorded_ms[1:], own[1:], strict=True)]
        return [uncached_ms / sum(steps_ms), middle(over), middle(steps_ms[1:]), steps_ms[0], uncached_ms]

    numbers = in_turn({"round": a_round}, rounds, warm_up=0)["round"]
    result = {name: middle(own) for name, own in zip(NUMBERS, numbers, strict=True)}
    operators = {name: {"ms": middle([own[name] for own in operators_ms])} for name in operators_ms[0]}
    Report("Decoding, in place, median", operators, {"ms": "{ms:.3f}"}, "operator of a step").show()
    usual = (batch, prompt, tokens) == (4, 32, 256)  # for which the first limit holds
    texts, per_s = f"{batch} x ({prompt} + {tokens}) tokens", batch * 1e3 / result["tpot_ms"]
    rows = {
        f"without a cache over with one, {texts}": ("cached_over_uncached", "at least 9" if usual else ""),
        "a decoding step over the sum of its operators": ("decode_over_operators", "at most 1.3"),
        f"time of a decoding step in ms ({per_s:.0f} tokens/s)": ("tpot_ms", ""),
        "time to the first token in ms": ("ttft_ms", ""),
    }
    shown = {words: {"median": result[name], "limit": limit} for words, (name, limit) in rows.items()}
    Report("", shown, {"median": "{median:.3g}", "limit": "{limit}"}, "generation").show()
    return result


def cached(
    model: Any, ids_BS: Tensor, tokens: int, recorder: Recorder | None = None
) -> tuple[Tensor, list[float], list[dict[str, float]]]:
    """Return the texts [B, S + tokens], and the times in ms of each step and, if it is recorded, of its operators."""
    steps = stream(model, ids_BS.tolist(), Stopping(tokens), GREEDY)
    columns: list[Tensor] = []
    times_ms, operators_ms = [], []
    for _ in range(tokens):
        times_ms.append(1e3 * seconds(lambda: columns.append(torch.tensor(next(steps).ids))))
        if recorder is not None:
            own: dict[str, float] = {}
            for span in recorder.spans("forward"):
                own[span.operator] = own.get(span.operator, 0.0) + 1e3 * (span.end - span.start)
            operators_ms.append(own)
            recorder.marks.clear()
    return torch.cat([ids_BS, torch.stack(columns, 1)], 1), times_ms, operators_ms


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

    def note(begins: bool) -> None:
        recorder.marks.append(Mark("head", "forward", begins, recorder.now()))

    begins = model.head.register_forward_pre_hook(lambda *_: note(True))
    ends = model.head.register_forward_hook(lambda *_: note(False))
    for block in moe_blocks_of(model):
        block.run_as(block.schedule, block.moe.dispatcher, recorder)
    with begins, ends:  # these remove the hooks
        yield recorder
    for block in moe_blocks_of(model):
        block.run_as(block.schedule, block.moe.dispatcher)
