"""Generation: continue texts token by token, with a cache of keys and values.

    prefill                     read the prompts, whole or in pieces: the logits of each one's next
                                token
    choose, decode, choose ...  read one token of each text at a time

The model is dropless while it generates: under a capacity, what a token becomes would depend on the
other texts of the batch and, for k >= 2, on later tokens. So a text is equal, token for token, to
the one that the model writes without a cache, and to the one that it writes alone.

Between ranks a prefill overlaps its transfers as the model's schedule says, with two batches in
flight too. Decoding is sequential and has one batch in flight: its transfers are a few rows, so
they take latency and not bandwidth, and overlap gains nothing.

Under expert parallelism every rank has its own texts and takes part in every pass. A rank whose
texts have ended goes on with tokens that are routed nowhere, until `Passes.all_ranks` says that all
have ended.

Passes set no_grad and not inference mode, because FSDP cannot begin in it. A caller without FSDP
may set it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.inference.sampling import Reason, Sampling, Stopping, choose
from scmoe.models.decoder import Decoder
from scmoe.models.run_as import running_as, schedule_of
from scmoe.moe.dispatcher import Blocking, Dispatcher
from scmoe.moe.layout import Buffers
from scmoe.moe.stream import dropless


@dataclass(frozen=True)
class Passes:
    """How the passes of a generation run.

    all_ranks: whether a statement is true on all ranks (Mesh.true_on_all_ranks); with one rank, the
    statement itself. piece: tokens of a prompt that one pass reads; None: all of them.
    """

    all_ranks: Callable[[bool], bool] = bool
    piece: int | None = None


ONE_RANK_PASSES = Passes()


def read_prompts(
    model: Decoder, ids_BS: Tensor, mask_BS: Tensor, cache: KVCache, passes: Passes
) -> Tensor:
    """Read all prompts, piece by piece. Return [B, V], the logits after each row's last token.

    Every rank takes as many passes as the one with the longest prompt. A rank that has read its own
    prompts takes part with padding.
    """
    longest = ids_BS.shape[1]
    size = passes.piece or longest
    start = 0
    logits_BV = None
    while logits_BV is None or not passes.all_ranks(start >= longest):
        if start < longest:
            piece_BS = ids_BS[:, start : start + size]
            real_BS = mask_BS[:, start : start + size]
        else:
            piece_BS = ids_BS[:, :1]
            real_BS = torch.zeros_like(mask_BS[:, :1])

        after_BV = prefill(model, piece_BS, real_BS, cache)
        if logits_BV is None:
            logits_BV = after_BV
        else:
            logits_BV = after_BV.where(real_BS.any(1, keepdim=True), logits_BV)
        start += size
    return logits_BV


@torch.no_grad()
def prefill(model: Decoder, ids_BS: Tensor, mask_BS: Tensor, cache: KVCache) -> Tensor:
    """Read prompts, or the next piece of each. Return [B, V], the logits after each row's last
    token.

    mask_BS False: padding, at the end of a row. The logits of a row of padding alone have no
    meaning.
    """
    new_B = mask_BS.sum(1)
    seq_len = ids_BS.shape[1]
    new = new_B.tolist()
    cache.expect(new, seq_len)
    last_B = (new_B - 1).clamp(min=0)
    return model(ids_BS, None if min(new) == seq_len else mask_BS, cache, last_B).logits_BSV[:, 0]


@torch.no_grad()
def decode(model: Decoder, ids_B: Tensor, going: Sequence[bool], cache: KVCache) -> Tensor:
    """Read one token of each text. Return [B, V], the logits after it.

    going False: the text has ended, and its token is padding.
    """
    cache.expect(list(map(int, going)), 1)
    mask_B1 = None if all(going) else torch.tensor(going, device=ids_B.device)[:, None]
    return model(ids_B[:, None], mask_B1, cache).logits_BSV[:, 0]


def sequential(model: Decoder) -> running_as:
    """Return a context in which the model runs without overlap: one batch is in flight, and the
    blocks wait for each transfer between ranks as soon as it starts."""
    dispatchers: list[Dispatcher] = []
    for block in moe_blocks_of(model):
        dispatcher = block.moe.dispatcher
        dispatchers.append(Blocking(dispatcher) if block.moe.num_ranks > 1 else dispatcher)
    return running_as(model, schedule_of(model).in_one_batch, dispatchers)


def blocks_between_ranks(model: Decoder) -> list[MoEBlock]:
    """Return the MoE blocks whose experts are on several ranks."""
    return [block for block in moe_blocks_of(model) if block.moe.num_ranks > 1]


class NewTokens(NamedTuple):
    """One token of each text.

    ids: None for a text that has ended before. reasons: why a text ends with this token; None: it
    goes on.
    """

    ids: list[int | None]
    reasons: list[Reason | None]


class Continuation(NamedTuple):
    """The new tokens of a text, the stop token included."""

    ids: list[int]
    reason: Reason


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stopping: Stopping,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    passes: Passes = ONE_RANK_PASSES,
) -> list[Continuation]:
    """Return the continuation of each prompt. Arguments and errors are those of `stream`."""
    return collect(stream(model, prompts, stopping, sampling, seeds, passes), len(prompts))


def collect(steps: Iterable[NewTokens], num_texts: int) -> list[Continuation]:
    """Take all steps and return the continuation of each text."""
    continuations = [Continuation([], "length") for _ in range(num_texts)]
    for step in steps:
        for row, (token, reason) in enumerate(zip(step.ids, step.reasons, strict=True)):
            if token is not None:
                continuations[row].ids.append(token)
            if reason is not None:
                continuations[row] = continuations[row]._replace(reason=reason)
    return continuations


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stopping: Stopping,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    passes: Passes = ONE_RANK_PASSES,
) -> Iterator[NewTokens]:
    """Yield the next token of all texts at a time.

    prompts: token ids; of any lengths. sampling: None: `Sampling()`. seeds: of each text; None: 0,
    1, 2, ... passes: on several ranks with Mesh.true_on_all_ranks. Every rank must then take every
    step, also a rank without prompts. Raises ValueError for a prompt without a token, with an id
    that the model does not have, or with no room for max_tokens in the model's context, for a model
    in training mode, if prompts and seeds differ in number, and between ranks with
    moe.rows=buffers.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if model.training:
        raise ValueError("The model is in training mode. Call model.eval() before you generate.")

    inside = dropless(model)
    in_buffers = any(isinstance(moe.rows, Buffers) for moe in inside.streams)
    if in_buffers and passes.all_ranks is not bool:
        raise ValueError(
            "moe.rows is buffers, which needs equally many tokens on every rank. For texts of"
            " several ranks use moe.rows=filled."
        )

    vocab_size = model.head.out_features
    for row, prompt in enumerate(prompts):
        check_length(len(prompt), stopping.max_tokens, model.max_seq_len, f"prompt {row}")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {row} has ids {min(prompt)} to {max(prompt)}, allowed: 0 to"
                f" {vocab_size - 1}"
            )
    if len(seeds) != len(prompts):
        raise ValueError(
            f"There are {len(seeds)} seeds for {len(prompts)} prompts. Give one seed for each"
            " prompt."
        )
    return _steps(model, inside, prompts, stopping, sampling or Sampling(), seeds, passes)


def check_length(length: int, max_tokens: int, context: int, name: str) -> None:
    """Raise ValueError unless a prompt of `length` tokens and max_tokens new ones fit into the
    context."""
    if length == 0:
        raise ValueError(
            f"{name} is empty. Give it at least one token, such as the end of text that stands"
            " before a document."
        )
    if length + max_tokens > context:
        room = context - length
        advice = f"reduce max_tokens to {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"{name} has {length} tokens and max_tokens is {max_tokens}, allowed: {context}"
            f" together, the model's context (data.seq_len); {advice}"
        )


def _steps(
    model: Decoder,
    inside: dropless,
    prompts: Sequence[Sequence[int]],
    stopping: Stopping,
    sampling: Sampling,
    seeds: Sequence[int],
    passes: Passes,
) -> Iterator[NewTokens]:
    device = model.head.weight.device
    ids_BS, mask_BS = padded(prompts or [[]])  # a rank without texts brings padding alone
    ids_BS = ids_BS.to(device)
    mask_BS = mask_BS.to(device)
    batch_size, longest = ids_BS.shape

    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [0]]
    had_BV = torch.zeros(batch_size, model.head.out_features, dtype=torch.bool, device=device)
    had_BV.scatter_(1, ids_BS, True)
    written: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    cache = KVCache(batch_size, longest + stopping.max_tokens - 1, device)
    decoding = sequential(model)

    with inside:  # for passes only: between two steps the model is the caller's
        logits_BV = read_prompts(model, ids_BS, mask_BS, cache, passes)
    ended = passes.all_ranks(not going)
    while not ended:
        ids_B = choose(logits_BV, sampling, had_BV, generators)
        step = NewTokens([None] * len(prompts), [None] * len(prompts))
        for row, token in enumerate(ids_B.tolist()[: len(prompts)]):
            if going[row]:
                written[row].append(token)
                reason = stopping.reason(written[row])
                step.ids[row] = token
                step.reasons[row] = reason
                going[row] = reason is None
        yield step

        ended = passes.all_ranks(not any(going))
        if not ended:
            if sampling.repetition_penalty != 1:  # else nothing reads it
                had_BV.scatter_(1, ids_B[:, None], True)
            with inside, decoding:
                logits_BV = decode(model, ids_B, going or [False], cache)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids [B, S], padded at the end with each text's first token, and the mask of real
    tokens."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    longest = max(1, int(lengths_B.max()))
    rows = []
    for prompt in prompts:
        filler = prompt[0] if prompt else 0
        rows.append([*prompt, *[filler] * (longest - len(prompt))])
    return torch.tensor(rows), torch.arange(longest) < lengths_B[:, None]
