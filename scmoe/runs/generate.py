"""Continue texts with the model of a run or of an export. Every rank calls `generate_texts`.

Each rank has its own texts and its own experts. Prompts are taken in blocks of `batch_size` x
ranks; of a block, rank r takes prompts r, r + ranks, ... Before the next block, rank 0 collects the
results of this one in the order of the prompts.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import IMAGES
from scmoe.datamodules.text import TextDataModule
from scmoe.datamodules.tokenizer import Tokenizer
from scmoe.files import relative
from scmoe.inference.generate import (
    Continuation,
    NewTokens,
    Passes,
    blocks_between_ranks,
    check_length,
    collect,
    stream,
)
from scmoe.inference.offload.cache import Cache
from scmoe.inference.prompts import Prompt
from scmoe.inference.sampling import Sampling, Stopping
from scmoe.models.run_as import schedule_of
from scmoe.moe.dispatcher import Blocking
from scmoe.parallel.mesh import Mesh
from scmoe.runs.on_ranks import ending_together, find_weights, start_ranks
from scmoe.runs.trained import offloaded
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import Which

USUAL_TOKENS = 100


@dataclass(frozen=True)
class GenerationRequest:
    """What to write.

    max_tokens: None: USUAL_TOKENS, or what fits the context. batch_size: texts of a rank at a time.
    piece: tokens of a prompt that one pass reads; None: all.
    """

    prompts: Sequence[Prompt]
    max_tokens: int | None
    sampling: Sampling
    stop_strings: tuple[str, ...] = ()
    which: Which = "last"
    batch_size: int = 8
    piece: int | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, allowed: 1 or more")
        if self.piece is not None and self.piece < 1:
            raise ValueError(f"prefill_tokens is {self.piece}, allowed: 1 or more")
        # Stopping is made only for its checks, before anything is read.
        max_tokens = 1 if self.max_tokens is None else self.max_tokens
        Stopping(max_tokens, strings=self.stop_strings, decode=str)


def generate_texts(
    run: Path,
    request: GenerationRequest,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Call write(result) on rank 0 for each prompt, in order. Return the speed on rank 0, None on
    others.

    show: gets each piece of the first prompt's text as it comes. Raises ConfigError for what cannot
    be generated, before another rank starts.
    """
    weights, config = find_weights(run, request.which, request.overrides)
    # A data module of images is not built, as the images need not be there.
    data = None if config.data.name in IMAGES else build_datamodule(config)
    if not isinstance(data, TextDataModule):
        raise ConfigError(
            f"{run} was trained on {config.data.name} data, but only a run on text can continue"
            " texts."
        )
    if is_rank_zero():
        prepare_data(data, weights)
        encoded(request, data.tokenizer, config)  # so that a prompt that is too long starts no rank

    with model_on_rank(config, weights) as (model, mesh, cache):
        prompts = encoded(request, data.tokenizer, config)
        speed = write_all(model, mesh, prompts, request, data.tokenizer, write, show)

    if speed is None:
        return None
    if cache is not None:
        speed["offload"] = {
            **asdict(config.offload),
            "slots": cache.slots,
            "hit_rate": cache.hit_rate,
        }
    return {"run": str(relative(run)), "weights": weights.name, "dropless": True, **speed}


@contextmanager
def model_on_rank(config: Config, weights: Path) -> Iterator[tuple[Any, Mesh, Cache | None]]:
    """Yield the model of this rank, its mesh, and the cache of offloaded experts (None: experts
    are resident)."""
    if config.offload.way != "resident":
        with offloaded(config, weights) as (model, cache):
            yield model, Mesh(), cache
        return
    module, trainer = start_ranks(config, weights)
    with (
        ending_together(trainer),
        torch.inference_mode(),
        trainer.precision_plugin.val_step_context(),
    ):
        yield module.model, module.wire.mesh, None


def speed_lines(speed: dict[str, Any]) -> list[str]:
    """Return the lines that the console shows of a generation."""
    tokens_per_s = f"{speed['tokens_per_s']:.0f} tokens/s"
    first_token = f"first token after {speed['first_token_ms']:.0f} ms"
    tokens = f"{speed['tokens']} tokens"
    lines = [f"{tokens}, {tokens_per_s}, {first_token}, dropless, from {speed['weights']}"]
    if (offload := speed.get("offload")) is not None:
        rate = "no bound on fetching"
        if offload["rate_mb_s"] is not None:
            rate = f"at most {offload['rate_mb_s']:g} MB/s"
        lines.append(
            f"experts {offload['way']}, {offload['slots']} slots, {rate}, hit rate"
            f" {offload['hit_rate']:.2f}"
        )
    return [*lines, *(f"{shape} ran {how}" for shape, how in speed["ran"].items())]


def encoded(request: GenerationRequest, tokenizer: Tokenizer, config: Config) -> list[list[int]]:
    """Return the ids of every prompt. They begin with the end of text, as documents do in training.

    Raises ConfigError for a prompt that does not fit into the context.
    """
    max_tokens = request.max_tokens or 1
    prompts = []
    for number, prompt in enumerate(request.prompts, start=1):
        ids = [tokenizer.end_of_text, *tokenizer.encode(prompt.text or "").tolist()]
        try:
            check_length(len(ids), max_tokens, config.data.seq_len, f"prompt {number}")
        except ValueError as error:
            raise ConfigError(str(error).replace("max_tokens", "--max-tokens")) from error
        prompts.append(ids)
    return prompts


def write_all(
    model: Any,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    request: GenerationRequest,
    tokenizer: Tokenizer,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str], None] | None,
) -> dict[str, Any] | None:
    """Generate all texts, block by block. Return the speed on rank 0: tokens of all
    ranks over the time of generating."""
    seeds = [prompt.seed for prompt in request.prompts]
    room = model.max_seq_len - max(map(len, prompts))
    max_tokens = request.max_tokens or min(USUAL_TOKENS, room)
    ends = frozenset({tokenizer.end_of_text})
    stopping = Stopping(max_tokens, ends, request.stop_strings, tokenizer.decode)
    passes = Passes(mesh.true_on_all_ranks, request.piece)

    tokens = 0
    seconds = 0.0
    first_s = 0.0
    block = request.batch_size * mesh.world_size
    for start in range(0, len(prompts), block):
        mine = slice(start + mesh.rank, start + block, mesh.world_size)
        steps = stream(model, prompts[mine], stopping, request.sampling, seeds[mine], passes)
        begun = time.perf_counter()
        first = [*islice(steps, 1)]
        first_s = first_s or time.perf_counter() - begun
        steps = chain(first, steps)
        texts = collect(shown(steps, stopping, show) if show else steps, len(prompts[mine]))
        seconds += time.perf_counter() - begun

        by_rank = mesh.gather_on_rank_zero(texts)
        if by_rank is None:
            continue
        for number, (ids, reason) in enumerate(in_order(by_rank), start):
            tokens += len(ids)
            text, seed = request.prompts[number]
            write(
                {
                    "prompt": text,
                    "seed": seed,
                    "text": stopping.text(ids),
                    "tokens": len(ids),
                    "ended": reason,
                }
            )
    if mesh.rank != 0:
        return None
    return {
        "texts": len(prompts),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_token_ms": 1e3 * first_s,
        "ran": how_passes_run(model),
    }


def in_order(by_rank: Sequence[Sequence[Continuation]]) -> list[Continuation]:
    """Return the texts of all ranks in the order of their prompts, which were dealt to the ranks in
    turn."""
    rounds = zip_longest(*by_rank)
    return [text for texts in rounds for text in texts if text is not None]


def how_passes_run(model: Any) -> dict[str, str]:
    """Return a text for each shape of pass, which says how the MoE layers run in it."""
    schedule = schedule_of(model)
    names = {f"{each.name}, {each.place} x {each.chunks}" for each in schedule.blocks}
    configured = "as configured: " + (", ".join(sorted(names)) or "dense")
    between_ranks = blocks_between_ranks(model)
    prefill = configured
    if any(isinstance(block.moe.dispatcher, Blocking) for block in between_ranks):
        prefill += ", sequential"
    prefill += schedule.batches_in_words
    return {"prefill": prefill, "decode": "sequential" if between_ranks else configured}


def shown(
    steps: Iterable[NewTokens], stopping: Stopping, show: Callable[[str], None]
) -> Iterator[NewTokens]:
    """Yield the steps, and call `show` with what each one adds to the first text, whose blank lines
    at the beginning are left out."""
    ids: list[int] = []
    done = ""
    for step in steps:
        if step.ids and step.ids[0] is not None:
            ids.append(step.ids[0])
            text = stopping.text(ids, ended=step.reasons[0] is not None)
            text = re.sub(r"\A\s*\n", "", text) if text.strip() else ""
            show(text[len(done) :])
            done = text
        yield step


@contextmanager
def to_file(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes lines into a file, on rank 0 only.

    Until the first line, the file is unchanged. Without any line, an earlier file keeps its lines,
    and a new one is removed at the end.
    """
    is_new = not path.exists()
    try:
        file = path.open("a", encoding="utf-8") if is_rank_zero() else None
    except OSError as error:
        raise ConfigError(
            f"--out is {path}, which cannot be written: {error}. Give another file."
        ) from error
    earlier = path.is_file()  # a pipe holds nothing to remove

    def write(text: dict[str, Any]) -> None:
        nonlocal earlier, is_new
        assert file is not None, "only rank 0 writes"
        is_new = False
        if earlier:
            file.truncate(0)
            earlier = False
        print(json.dumps(text, ensure_ascii=False), file=file, flush=True)

    try:
        yield write
    finally:
        if file is not None:
            file.close()
            if is_new:
                path.unlink(missing_ok=True)
