"""Uneven routing as a value: which share of the copies each expert gets, and the experts that each
token goes to. It is what benches take as `--load`, and `scmoe advise` as `load=`:

    p_e                share of the T K copies of a step that go to expert e; a rank has E / R
                       neighbouring experts
    balanced           1 / E
    zipf:A             (e + 1)^-A over the sum of these: the hot experts are neighbours
    hot_rank:X         X / E for each expert of rank 0; the others have equal parts of the rest
    rotating:X:N       hot_rank:X, and the next rank is the hot one after every N steps
    ragged:X           balanced, but rank 0 has X times the mean number of tokens; the others share
                       the rest
    recorded:FILE      the choices of a recorded run (moe/recorded_routing.py), in turn; FILE:STEP
                       and FILE:STEP:LAYER are a part of it

A token goes to K distinct experts, so p_e is at most 1 / K: what zipf has above it goes to the
other experts in proportion. All ranks deal the same choices to their tokens (but for `recorded`).
Copies of hot and cold experts are mixed along the tokens, so chunks of tokens have equal loads.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from scmoe.config.leaves import ConfigError
from scmoe.moe.balance import load_max
from scmoe.moe.recorded_routing import read_routing
from scmoe.moe.router import round_robin

BALANCED = "balanced"
LOAD_KINDS = "balanced zipf:A hot_rank:X rotating:X:N ragged:X recorded:FILE"
FORMS = {form.partition(":")[0]: form for form in LOAD_KINDS.split()}


class Sizes(NamedTuple):
    """The experts, the choices of a token, and the ranks that share the experts."""

    num_experts: int
    top_k: int
    ranks: int


@dataclass(frozen=True, eq=False)
class Load:
    """heat: A or X. period: N. entries: recorded ids [T, K] of one batch on all ranks each."""

    name: str
    kind: str
    heat: float = 1.0
    period: int = 1
    num_experts: int = 0
    entries: list[Tensor] = field(default_factory=list)

    def phases(self, ranks: int) -> int:
        """Return the number of different routings; they repeat in this order."""
        if self.kind == "rotating":
            return ranks
        return len(self.entries) if self.kind == "recorded" else 1

    def phase(self, step: int, ranks: int) -> int:
        """Return which of the routings a step has."""
        return step // self.period % self.phases(ranks)


@dataclass
class CurrentLoad:
    """What the routers of a bench deal at this moment; the bench changes it between steps."""

    load: Load
    step: int = 0


# ---------------------------------------------------------------------- reading and refusing


@cache
def load_of(text: str) -> Load:
    """Return the load that a text names. ConfigError: it names none."""
    kind, *values = text.split(":")
    if kind == "recorded" and values:
        return recorded(text)
    if kind not in FORMS or len(values) != FORMS[kind].count(":"):
        raise ConfigError(f"load is {text}, allowed: {' | '.join(FORMS.values())}")
    try:
        heat = float(values[0]) if values else 1.0
        period = int(values[1]) if len(values) > 1 else 1
    except ValueError:
        raise ConfigError(
            f"load is {text}, allowed: {FORMS[kind]}, A and X numbers, N a whole number"
        ) from None
    return Load(text, kind, heat, period)


def recorded(text: str) -> Load:
    """Return the load of a recording's file, or of one step or layer of it."""
    parts = re.fullmatch(r"recorded:(.*?)(?::(\d+))?(?::(\d+))?", text)
    assert parts is not None
    file, step, layer = parts.groups()
    try:
        recording = read_routing(Path(file))
    except ValueError as error:
        raise ConfigError(f"load is {text}: {error}") from error
    layers = range(len(recording.ids))
    for what, number, recorded_numbers in (
        ("step", step, recording.steps),
        ("layer", layer, layers),
    ):
        if number is not None and int(number) not in recorded_numbers:
            allowed = ", ".join(map(str, recorded_numbers))
            raise ConfigError(f"load is {text}, allowed as {what}: {allowed}")

    num_steps = len(recording.steps)
    steps = range(num_steps) if step is None else [recording.steps.index(int(step))]
    ids = recording.ids if layer is None else [recording.ids[int(layer)]]
    entries = []
    for s in steps:
        for ids_STK in ids:
            is_token_T = (ids_STK[s] < recording.num_experts).all(-1)  # no padding, no zero experts
            entries.append(ids_STK[s][is_token_T])
    # any number of steps from the first on is spread over the whole recording
    spread = [entries[i] for i in mixed(len(entries))]
    return Load(text, "recorded", num_experts=recording.num_experts, entries=spread)


def check_load(load: Load, sizes: Sizes, sequences: int) -> None:
    """Raise ConfigError for a load that cannot be dealt. sequences: mean number of a rank's."""
    if load.kind == "recorded":
        refuse_recording(load, sizes)
    elif allowed := allowed_instead(load, sizes, sequences):
        raise ConfigError(f"load is {load.name}, allowed{allowed}")


def refuse_recording(load: Load, sizes: Sizes) -> None:
    """Raise ConfigError for a recording that cannot be dealt to these experts and ranks."""
    if load.num_experts != sizes.num_experts:
        raise ConfigError(
            f"load is {load.name}, a recording of {load.num_experts} experts, but the blocks have"
            f" {sizes.num_experts}. Give another recording or number of experts"
        )
    if min(map(len, load.entries), default=0) < sizes.ranks:
        raise ConfigError(
            f"load is {load.name}, which has fewer tokens in a step than the {sizes.ranks} ranks,"
            " apart from padding. Give another recording"
        )


def allowed_instead(load: Load, sizes: Sizes, sequences: int) -> str | None:
    """Return which multiples, exponents and numbers could be dealt; None: this load's can."""
    experts, top_k, ranks = sizes
    if load.period < 1:
        return ": N of 1 or more"

    if load.kind in ("hot_rank", "rotating"):
        limits = {f"{ranks} ranks": ranks, f"top-{top_k} of {experts} experts": experts / top_k}
        reason = min(limits, key=lambda name: limits[name])
        most = limits[reason]
        return None if 1 <= load.heat <= most else f" with {reason}: 1 to {most:g}"

    if load.kind == "zipf":
        return None if 0 <= load.heat <= 10 else ": 0 to 10"

    if load.kind == "ragged":
        most = (ranks * sequences - ranks + 1) / sequences  # the others have one sequence each
        if not (1 <= load.heat <= most and (load.heat * sequences).is_integer()):
            steps = f"multiples of {1 / sequences:g} from 1 to {most:g}"
            return f" with {ranks} ranks of {sequences} sequences: {steps}"
    return None


def loads_suffix(loads: Sequence[str]) -> str:
    """Return the end of a report's name, such as -hot_rank-recorded; empty without loads."""
    return "".join(f"-{kind}" for kind in dict.fromkeys(load_of(load).kind for load in loads))


# ---------------------------------------------------------------------- shares of the experts


def shares(load: Load, sizes: Sizes, phase: int = 0) -> list[float]:
    """Return p_e as above in one phase of the load, [E]. They sum to 1."""
    experts, top_k, ranks = sizes
    if load.kind == "zipf":
        heat_E = [(e + 1) ** -load.heat for e in range(experts)]
        return capped([heat / sum(heat_E) for heat in heat_E], 1 / top_k)

    num_local_experts = experts // ranks
    is_hot = load.kind in ("hot_rank", "rotating") and ranks > 1
    if not is_hot:
        return [1 / experts] * experts

    first = phase * num_local_experts
    hot_experts = range(first, first + num_local_experts)
    rest = (experts - num_local_experts * load.heat) / (experts - num_local_experts)
    return [(load.heat if e in hot_experts else rest) / experts for e in range(experts)]


def capped(shares_E: Sequence[float], most: float) -> list[float]:
    """Return shares of at most `most`: what is above it goes to the other ones in proportion."""
    full: set[int] = set()
    while True:
        rest = sum(p for e, p in enumerate(shares_E) if e not in full)
        scale = (1 - most * len(full)) / rest if rest else 0.0
        above = {e for e, p in enumerate(shares_E) if e not in full and p * scale > most}
        if not above:
            return [most if e in full else p * scale for e, p in enumerate(shares_E)]
        full |= above


def copies(shares_E: Sequence[float], total: int) -> list[int]:
    """Return whole numbers of copies that sum to `total`, by the largest remainders."""
    exact = [round(p * total, 6) for p in shares_E]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda e: counts[e] - exact[e])
    for e in by_remainder[: total - sum(counts)]:
        counts[e] += 1
    return counts


def rank_sequences(load: Load, mean: int, ranks: int) -> list[int]:
    """Return the sequences of each rank in a batch: `mean` of them, but for a ragged load."""
    if load.kind != "ragged":
        return [mean] * ranks
    first = round(load.heat * mean)
    others, extra = divmod(ranks * mean - first, ranks - 1)
    return [first, *(others + (r < extra) for r in range(ranks - 1))]


# ---------------------------------------------------------------------- experts of each token


def deal(sizes: Sizes, rank: int, current: CurrentLoad) -> Callable[[Tensor], Tensor]:
    """Return a router's deal of expert ids (moe/router.py) by the current load.

    rank: among those that share the experts.
    """
    return partial(_dealt, sizes, rank, current)


def _dealt(sizes: Sizes, rank: int, current: CurrentLoad, x_TD: Tensor) -> Tensor:
    phase = current.load.phase(current.step, sizes.ranks)
    return dealt_on(x_TD.device, current.load, sizes, rank, x_TD.shape[0], phase)


@lru_cache(512)
def dealt_on(
    device: torch.device, load: Load, sizes: Sizes, rank: int, num_tokens: int, phase: int
) -> Tensor:
    """Return `dealt_ids` on a device. It is copied there once: each copy from the host waits for
    all that the device has to do."""
    return dealt_ids(load, sizes, rank, num_tokens, phase).to(device)


@lru_cache(512)
def dealt_ids(load: Load, sizes: Sizes, rank: int, num_tokens: int, phase: int = 0) -> Tensor:
    """Return distinct expert ids of each token of a rank, [T, K]."""
    if load.kind in (BALANCED, "ragged"):
        return round_robin(sizes.num_experts, sizes.top_k)(torch.empty(num_tokens, 0))
    if load.kind == "recorded":
        return replayed(load.entries[phase], sizes, rank, num_tokens)
    counts_E = torch.tensor(copies(shares(load, sizes, phase), num_tokens * sizes.top_k))
    # the copies in the order of experts, cut into K rows: an expert has at most T copies, so at
    # most one in a column
    line_N = torch.arange(sizes.num_experts).repeat_interleave(counts_E)
    return line_N.view(sizes.top_k, num_tokens).T[mixed(num_tokens)].contiguous()


def mixed(length: int) -> Tensor:
    """Return a permutation of which every part of neighbours is spread evenly over the whole.

    It is van der Corput's sequence.
    """
    numbers = torch.arange(length)
    reversed_ = torch.zeros(length, dtype=torch.int64)
    for _ in range(max(1, (length - 1).bit_length())):
        reversed_ = reversed_ * 2 + numbers % 2
        numbers //= 2
    return reversed_.argsort().argsort()


def replayed(ids_TK: Tensor, sizes: Sizes, rank: int, num_tokens: int) -> Tensor:
    """Return this rank's part of a recorded batch, [T, K].

    Tokens are taken from that part at equal distances; if it has too few, each one is repeated. If
    more choices were recorded, the first K are taken. If fewer, a token's further choice is the
    first choice of a later token that it does not have yet, so the distribution is the same. Where
    nearly all tokens go to one expert, it is the next expert.
    """
    part_TK = ids_TK.tensor_split(sizes.ranks)[rank]
    tokens = torch.arange(num_tokens) * len(part_TK) // num_tokens
    chosen_TK = part_TK[tokens, : sizes.top_k]
    first_T = chosen_TK[:, 0]
    candidates = [first_T.roll(-distance) for distance in range(1, 65)]
    candidates += [(first_T + expert) % sizes.num_experts for expert in range(1, sizes.num_experts)]
    while chosen_TK.shape[1] < sizes.top_k:
        further_T = torch.full((num_tokens,), -1)
        for other_T in candidates:
            is_new_T = (further_T < 0) & (chosen_TK != other_T[:, None]).all(-1)
            further_T = other_T.where(is_new_T, further_T)
        chosen_TK = torch.cat([chosen_TK, further_T[:, None]], 1)
    return chosen_TK


# ---------------------------------------------------------------------- effects of a load


def counts_of(
    load: Load, sizes: Sizes, tokens: Sequence[int], phase: int, chunks: int = 1
) -> Tensor:
    """Return copies, [P, senders, E]. tokens: of each rank."""
    of_senders = []
    for rank, num_tokens in enumerate(tokens):
        ids_TK = dealt_ids(load, sizes, rank, num_tokens, phase)
        size = -(-num_tokens // chunks)
        parts = [ids_TK[p * size : (p + 1) * size].flatten() for p in range(chunks)]
        counts_PE = [torch.bincount(part, minlength=sizes.num_experts) for part in parts]
        of_senders.append(torch.stack(counts_PE))
    return torch.stack(of_senders, 1)


def imbalance(load: Load, sizes: Sizes, sequences: int, seq_len: int) -> dict[str, float]:
    """Return the copies of the busiest rank and expert, and the most tokens of a rank.

    Each is over its mean: of the most uneven phase, or the median of recorded routings.
    """
    tokens = [seq_len * number for number in rank_sequences(load, sequences, sizes.ranks)]
    of_ranks, of_experts = [], []
    for phase in range(load.phases(sizes.ranks)):
        counts_1E = counts_of(load, sizes, tokens, phase).sum(1)
        of_ranks.append(load_max(counts_1E, sizes.ranks).item())
        of_experts.append(load_max(counts_1E, sizes.num_experts).item())

    over_phases = median if load.kind == "recorded" else max
    return {
        "max_over_mean_ranks": over_phases(of_ranks),
        "max_over_mean_experts": over_phases(of_experts),
        "max_over_mean_tokens": max(tokens) * sizes.ranks / sum(tokens),
    }
