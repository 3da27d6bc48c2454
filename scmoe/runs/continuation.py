"""Continues texts with the model of a run or of an export, from top to bottom. Every rank calls
`generate_texts`.

Each rank has its own texts and its own experts. Prompts are taken in blocks of `batch_size` x
ranks; of a block, rank r takes prompts r, r + ranks, ... Rank 0 collects the results of a block in
the order of the prompts before the next one.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import ARCHITECTURES, IMAGES
from scmoe.config.rules import resolve_ep_size
from scmoe.datamodules.text import TextDataModule
from scmoe.datamodules.tokenizer import Tokenizer
from scmoe.inference.generate import Passes, Step, check_length, collect, stream
from scmoe.inference.offload.cache import Cache
from scmoe.inference.planned import plan_passes
from scmoe.inference.prompts import Prompt
from scmoe.inference.sampling import Sampling, Stopping
from scmoe.parallel.mesh import ParallelContext
from scmoe.runs.on_ranks import ending_together, find_weights, start_ranks
from scmoe.runs.trained import offloaded
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.run.directory import relative
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import Which

USUAL_TOKENS = 100


@dataclass(frozen=True)
class Request:
    """What to write. max_tokens: None: USUAL_TOKENS, or what fits the context. batch_size: texts of
    a rank at a time.

    piece: tokens of a prompt that one pass reads; None: all. plan: measure first how prefill and
    decode run best.
    """

    prompts: Sequence[Prompt]
    max_tokens: int | None
    sampling: Sampling
    stop_strings: tuple[str, ...] = ()
    which: Which = "last"
    batch_size: int = 8
    piece: int | None = None
    plan: bool = False
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, allowed: 1 or more")
        if self.piece is not None and self.piece < 1:
            raise ValueError(f"prefill_tokens is {self.piece}, allowed: 1 or more")
        most = 1 if self.max_tokens is None else self.max_tokens
        Stopping(most, strings=self.stop_strings, decode=str)  # its checks, before anything is read


def generate_texts(
    run: Path,
    request: Request,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Call write(result) on rank 0 for each prompt, in order; return the speed, None on ranks other
    than 0.

    show: gets each piece of the first prompt's text as it comes. Raises ConfigError for what cannot
    be generated, before another rank starts.
    """
    weights, config = find_weights(run, request.which, request.overrides)
    if request.plan:
        check_plan(config)
    data = (
        build_datamodule(config) if config.data.name not in IMAGES else None
    )  # images need not be there
    if not isinstance(data, TextDataModule):
        raise ConfigError(
            f"{run} was trained on {config.data.name} data, but only a run on text can continue"
            " texts."
        )
    if is_rank_zero():
        prepare_data(data, weights)
        encoded(request, data.tokenizer, config)  # so that a prompt that is too long starts no rank
    with placed(config, weights) as (model, context, cache):
        prompts = encoded(request, data.tokenizer, config)
        speed = write_all(model, context, prompts, request, data.tokenizer, write, show)
    if speed is None:
        return None
    if cache is not None:
        speed["offload"] = {
            **asdict(config.offload),
            "slots": cache.slots,
            "hit_rate": cache.hit_rate,
        }
    return {"run": str(relative(run)), "weights": weights.name, "dropless": True, **speed}


def check_plan(config: Config) -> None:
    """Raise ConfigError where --plan has nothing to measure."""
    architecture = config.moe.architecture
    if resolve_ep_size(config) == 1:
        raise ConfigError("--plan needs experts on several ranks, such as trainer.devices=2.")
    if architecture not in ARCHITECTURES.built_in:
        raise ConfigError(
            f"--plan does not work with moe.architecture={architecture}, which an extension"
            " defines."
        )
    if architecture == "dgmoe_share":
        raise ConfigError(
            "--plan does not work with moe.architecture=dgmoe_share: two pairs share one MoE"
            " module."
        )
    if config.schedule.batches_in_flight == 2 or config.schedule.transfers == "sequential":
        chosen = "schedule.batches_in_flight=2 and schedule.transfers=sequential"
        raise ConfigError(f"--plan chooses how one batch hides its transfers. Leave out {chosen}.")


@contextmanager
def placed(config: Config, weights: Path) -> Iterator[tuple[Any, ParallelContext, Cache | None]]:
    """Give the model on this rank, the rank's place, and the cache of experts that are not
    resident."""
    if config.offload.way != "resident":
        with offloaded(config, weights) as (model, cache):
            yield model, ParallelContext(), cache
        return
    module, trainer = start_ranks(config, weights)
    with (
        ending_together(trainer),
        torch.inference_mode(),
        trainer.precision_plugin.val_step_context(),
    ):
        yield module.model, module.parallel_context, None


def speed_lines(speed: dict[str, Any]) -> list[str]:
    """Return what the console shows of a generation."""
    rates = (
        f"{speed['tokens_per_s']:.0f} tokens/s, first token after {speed['first_token_ms']:.0f} ms"
    )
    lines = [f"{speed['tokens']} tokens, {rates}, dropless, from {speed['weights']}"]
    if (offload := speed.get("offload")) is not None:
        rate = (
            "no bound on fetching"
            if offload["rate_mb_s"] is None
            else f"at most {offload['rate_mb_s']:g} MB/s"
        )
        lines.append(
            f"experts {offload['way']}, {offload['slots']} slots, {rate}, hit rate"
            f" {offload['hit_rate']:.2f}"
        )
    return [*lines, *(f"{shape} ran {how}" for shape, how in speed["ran"].items())]


def encoded(request: Request, tokenizer: Tokenizer, config: Config) -> list[list[int]]:
    """Return the ids of every prompt, which begin with the end of text, as documents do in
    training."""
    found = []
    for number, prompt in enumerate(request.prompts):
        found.append([tokenizer.end_of_text, *tokenizer.encode(prompt.text or "").tolist()])
        try:
            check_length(
                len(found[-1]), request.max_tokens or 1, config.data.seq_len, f"prompt {number + 1}"
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return found


def write_all(
    model: Any,
    context: ParallelContext,
    prompts: Sequence[Sequence[int]],
    request: Request,
    tokenizer: Tokenizer,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str], None] | None,
) -> dict[str, Any] | None:
    """Generate all texts, block by block. Return the speed on rank 0: tokens of all ranks by the
    time of generating."""
    seeds = [prompt.seed for prompt in request.prompts]
    most = request.max_tokens or min(USUAL_TOKENS, model.max_seq_len - max(map(len, prompts)))
    stopping = Stopping(
        most, frozenset({tokenizer.end_of_text}), request.stop_strings, tokenizer.decode
    )
    passes, what_ran = passes_of(model, context, prompts, request)
    tokens, seconds, first_s = 0, 0.0, 0.0
    for start in range(0, len(prompts), block := request.batch_size * context.world_size):
        own = slice(start + context.rank, start + block, context.world_size)
        steps = stream(model, prompts[own], stopping, request.sampling, seeds[own], passes)
        begun = time.perf_counter()
        first = [*islice(steps, 1)]
        first_s = first_s or time.perf_counter() - begun
        steps = chain(first, steps)
        texts = collect(shown(steps, stopping, show) if show else steps, len(prompts[own]))
        seconds += time.perf_counter() - begun
        of_ranks = context.gather_on_rank_zero(texts)
        if of_ranks is None:
            continue
        for number in range(start, min(start + block, len(prompts))):
            place, rank = divmod(number - start, context.world_size)
            ids, reason = of_ranks[rank][place]
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
    if context.rank != 0:
        return None
    return {
        "texts": len(prompts),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_token_ms": 1e3 * first_s,
        "ran": what_ran,
    }


def passes_of(
    model: Any, context: ParallelContext, prompts: Sequence[Sequence[int]], request: Request
) -> tuple[Passes, dict[str, str]]:
    """Return the Passes, and texts that say how prefill and decode run. With request.plan every
    rank measures first."""
    passes = Passes(context.true_on_all_ranks, request.piece)
    blocks = moe_blocks_of(model)
    if not request.plan:
        as_set = sorted(
            {f"{b.schedule.name}, {b.schedule.place} x {b.schedule.chunks}" for b in blocks}
        )
        return passes, dict.fromkeys(
            ("prefill", "decode"), "as configured: " + (", ".join(as_set) or "dense")
        )
    longest = max(map(len, prompts))
    prompt = min(longest, request.piece or longest)
    plans, begin = plan_passes(model, request.batch_size, prompt, context.ep_size)
    return replace(passes, begin=begin), {shape: str(plan) for shape, plan in plans.items()}


def shown(steps: Iterable[Step], stopping: Stopping, show: Callable[[str], None]) -> Iterator[Step]:
    """Pass the steps on, and give `show` what each one adds to the first text."""
    ids: list[int] = []
    done = ""
    for step in steps:
        if step.ids and step.ids[0] is not None:
            ids.append(step.ids[0])
            text = stopping.text(ids, ended=step.reasons[0] is not None)
            show(text[len(done) :])
            done = text
        yield step


@contextmanager
def to_file(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that writes lines into a file, on rank 0 only. Until the first line the file
    is as it was: an earlier one keeps its lines, and a new one is removed."""
    is_new = not path.exists()
    try:
        file = path.open("a", encoding="utf-8") if is_rank_zero() else None
    except OSError as error:
        raise ConfigError(f"--out is {path}, which cannot be written: {error}") from error
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
