"""Uneven routing as a value: which share of the copies each expert gets, and the experts that each
token goes to.

    p_e                share of the T K copies of a step that go to expert e; a rank has E / R
                       neighbouring experts
    balanced           1 / E
    zipf:A             (e + 1)^-A over the sum of these: the hot experts are neighbours
    spread:A           the same heat, dealt to the ranks in the order 0, 1, 1, 0, .., hottest first
    hot_expert:X       X / E for expert 0; the others have equal parts of the rest
    hot_rank:X         X / E for each expert of rank 0; the others have equal parts of the rest
    empty_rank         0 for each expert of the last rank; the others have equal parts
    rotating:X:N       hot_rank:X, and the next rank is the hot one after every N steps
    burst:X:N          rotating:X:N with N balanced steps after every N hot ones
    ragged:X           balanced, but rank 0 has X times the mean number of tokens; the others share
                       the rest
    recorded:FILE      the choices of a recorded run (scmoe/probes/routing.py), in turn; FILE:STEP
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
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.engine.clock import middle
from scmoe.config.leaves import ConfigError
from scmoe.moe.balance import load_max
from scmoe.moe.router import round_robin
from scmoe.probes.routing import read_routing

BALANCED = "balanced"
KINDS = (
    "balanced zipf:A spread:A hot_expert:X hot_rank:X empty_rank rotating:X:N burst:X:N ragged:X"
    " recorded:FILE"
)
FORMS = {form.partition(":")[0]: form for form in KINDS.split()}


class Place(NamedTuple):
    """Experts, choices of a token, and the ranks that share the experts."""

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
        """The number of different routings; they repeat in this order."""
        return {"rotating": ranks, "burst": 2 * ranks, "recorded": len(self.entries)}.get(
            self.kind, 1
        )

    def phase(self, step: int, ranks: int) -> int:
        return step // self.period % self.phases(ranks)


@dataclass
class Now:
    """What the routers of a bench deal at this moment."""

    load: Load
    step: int = 0


# ---------------------------------------------------------------------- reading and refusing


@cache
def load_of(text: str) -> Load:
    """Raises ConfigError for a text that is no load."""
    kind, *values = text.split(":")
    if kind == "recorded" and values:
        return recorded(text)
    if kind not in FORMS or len(values) != FORMS[kind].count(":"):
        raise ConfigError(f"--load is {text}, allowed: {' | '.join(FORMS.values())}")
    try:
        numbers = float((values or ["1"])[0]), int((values[1:] or ["1"])[0])
    except ValueError:
        raise ConfigError(
            f"--load is {text}, allowed: {FORMS[kind]}, A and X numbers, N a whole number"
        ) from None
    return Load(text, kind, *numbers)


def recorded(text: str) -> Load:
    file, step, layer = re.fullmatch(r"recorded:(.*?)(?::(\d+))?(?::(\d+))?", text).groups()  # type: ignore[union-attr]
    try:
        found = read_routing(Path(file))
    except ValueError as error:
        raise ConfigError(f"--load is {text}: {error}") from error
    for what, given, there in (
        ("step", step, found.steps),
        ("layer", layer, range(len(found.ids))),
    ):
        if given is not None and int(given) not in there:
            raise ConfigError(f"--load is {text}, allowed as {what}: {', '.join(map(str, there))}")
    steps = range(len(found.steps)) if step is None else [found.steps.index(int(step))]
    ids = found.ids if layer is None else [found.ids[int(layer)]]
    entries = [ids_STK[s] for s in steps for ids_STK in ids]
    entries = [
        ids_TK[(ids_TK < found.num_experts).all(-1)] for ids_TK in entries
    ]  # no padding, no zero experts
    # any number of steps from the first on is spread over the whole recording
    return Load(
        text,
        "recorded",
        num_experts=found.num_experts,
        entries=[entries[i] for i in mixed(len(entries))],
    )


def why_impossible(load: Load, place: Place, sequences: int) -> str | None:
    """Return why the load cannot be dealt; None: it can. sequences: mean number of a rank's."""
    experts, top_k, ranks = place
    said, whole = f"--load is {load.name}, allowed", f"top-{top_k} of {experts} experts"
    if load.period < 1:
        return f"{said}: N of 1 or more"
    if load.kind in ("hot_rank", "rotating", "burst", "hot_expert"):
        most, where = experts / top_k, whole
        if load.kind != "hot_expert" and ranks <= most:
            most, where = ranks, f"{ranks} ranks"
        return None if 1 <= load.heat <= most else f"{said} with {where}: 1 to {most:g}"
    if load.kind in ("zipf", "spread"):
        return None if 0 <= load.heat <= 10 else f"{said}: 0 to 10"
    if load.kind == "empty_rank" and top_k > experts - experts // ranks:
        return f"{said} with {whole}: ranks that have no more than {experts - top_k} experts"
    if load.kind == "ragged":
        most = (ranks * sequences - ranks + 1) / sequences  # the others have one sequence each
        if not (1 <= load.heat <= most and (load.heat * sequences).is_integer()):
            steps = f"multiples of {1 / sequences:g} from 1 to {most:g}"
            return f"{said} with {ranks} ranks of {sequences} sequences: {steps}"
    if load.kind == "recorded" and load.num_experts != experts:
        return f"{said}: recordings of {experts} experts; it is one of {load.num_experts}"
    if load.kind == "recorded" and min(map(len, load.entries), default=0) < ranks:
        return (
            f"{said} with {ranks} ranks: recordings with a token for each rank, apart from padding"
        )
    return None


def kinds_of(loads: Sequence[str]) -> str:
    """Return the end of a report's name: -hot_rank, -hot_rank-recorded, or nothing without loads."""
    return "".join(f"-{kind}" for kind in dict.fromkeys(load_of(load).kind for load in loads))


# ---------------------------------------------------------------------- who gets how many copies


def shares(load: Load, place: Place, phase: int = 0) -> list[float]:
    """[E]: p_e as above, in one phase of the load. They sum to 1."""
    experts, top_k, ranks = place
    own = experts // ranks
    if load.kind in ("zipf", "spread"):
        return capped(zipf(load, place), 1 / top_k)
    if load.kind == "burst":
        phase, hot = phase // 2, phase % 2 == 0
    else:
        hot = load.kind in ("hot_rank", "rotating", "hot_expert")
    if load.kind == "empty_rank":
        return [1 / (experts - own) if e < experts - own else 0.0 for e in range(experts)]
    if not hot or own == experts:
        return [1 / experts] * experts
    first, size = (0, 1) if load.kind == "hot_expert" else (phase * own, own)
    rest = (experts - size * load.heat) / (experts - size)
    return [(load.heat if first <= e < first + size else rest) / experts for e in range(experts)]


def zipf(load: Load, place: Place) -> list[float]:
    experts, _, ranks = place
    heat = [(e + 1) ** -load.heat for e in range(experts)]
    shares_E = [own / sum(heat) for own in heat]
    if load.kind == "zipf":
        return shares_E
    # expert i of the heat's order goes to rank 0, 1, 1, 0, .. as its next expert
    places = [
        (ranks - 1 - i % ranks if i // ranks % 2 else i % ranks, i // ranks) for i in range(experts)
    ]
    return [shares_E[places.index(divmod(e, experts // ranks))] for e in range(experts)]


def capped(shares_E: Sequence[float], most: float) -> list[float]:
    """Shares of at most `most`: what is above it goes to the other ones in proportion."""
    full: set[int] = set()
    while True:
        rest = sum(p for e, p in enumerate(shares_E) if e not in full)
        scale = (1 - most * len(full)) / rest if rest else 0.0
        above = {e for e, p in enumerate(shares_E) if e not in full and p * scale > most}
        if not above:
            return [most if e in full else p * scale for e, p in enumerate(shares_E)]
        full |= above


def copies(shares_E: Sequence[float], total: int) -> list[int]:
    """Whole numbers of copies that sum to `total`, by the largest remainders."""
    exact = [round(p * total, 6) for p in shares_E]
    counts = [int(own) for own in exact]
    by_remainder = sorted(range(len(exact)), key=lambda e: counts[e] - exact[e])
    for e in by_remainder[: total - sum(counts)]:
        counts[e] += 1
    return counts


def sequences_of(load: Load, mean: int, ranks: int) -> list[int]:
    """Sequences of each rank in a batch: `mean` of them, but for a ragged load."""
    if load.kind != "ragged":
        return [mean] * ranks
    first = round(load.heat * mean)
    others, extra = divmod(ranks * mean - first, ranks - 1)
    return [first, *(others + (r < extra) for r in range(ranks - 1))]


# ---------------------------------------------------------------------- which token goes where


def deal(place: Place, rank: int, now: Now) -> Callable[[Tensor], Tensor]:
    """Return a router's deal of expert ids (moe/router.py) by the load of `now`. rank: among those
    of the experts."""
    return partial(_dealt, place, rank, now)


def _dealt(place: Place, rank: int, now: Now, x_TD: Tensor) -> Tensor:
    phase = now.load.phase(now.step, place.ranks)
    return ids_of(now.load, place, rank, x_TD.shape[0], phase).to(x_TD.device)


@lru_cache(512)
def ids_of(load: Load, place: Place, rank: int, num_tokens: int, phase: int = 0) -> Tensor:
    """[T, K] distinct expert ids of each token of a rank."""
    if load.kind in (BALANCED, "ragged"):
        return round_robin(place.num_experts, place.top_k)(torch.empty(num_tokens, 0))
    if load.kind == "recorded":
        return replayed(load.entries[phase], place, rank, num_tokens)
    counts_E = torch.tensor(copies(shares(load, place, phase), num_tokens * place.top_k))
    # the copies in the order of experts, cut into K rows: an expert has at most T copies, so at
    # most one in a column
    line_N = torch.arange(place.num_experts).repeat_interleave(counts_E)
    return line_N.view(place.top_k, num_tokens).T[mixed(num_tokens)].contiguous()


def mixed(length: int) -> Tensor:
    """A permutation of which every part of neighbours is spread evenly over the whole (van der
    Corput's sequence)."""
    numbers, reversed_ = torch.arange(length), torch.zeros(length, dtype=torch.int64)
    for _ in range(max(1, (length - 1).bit_length())):
        reversed_ = reversed_ * 2 + numbers % 2
        numbers //= 2
    return reversed_.argsort().argsort()


def replayed(ids_TK: Tensor, place: Place, rank: int, num_tokens: int) -> Tensor:
    """[T, K] of this rank's part of a recorded batch: tokens at equal distances of it, or each one
    several times.

    Of more recorded choices the first K are taken. Of fewer, a further choice of a token is the
    first choice of a later token that has another one, so it has the same distribution; where
    nearly all tokens go to one expert, it is the next expert."""
    part_TK = ids_TK.tensor_split(place.ranks)[rank]
    own_TK = part_TK[torch.arange(num_tokens) * len(part_TK) // num_tokens, : place.top_k]
    first_T = own_TK[:, 0]
    candidates = [first_T.roll(-distance) for distance in range(1, 65)]
    candidates += [(first_T + expert) % place.num_experts for expert in range(1, place.num_experts)]
    while own_TK.shape[1] < place.top_k:
        further_T = torch.full((num_tokens,), -1)
        for other_T in candidates:
            is_new_T = (further_T < 0) & (own_TK != other_T[:, None]).all(-1)
            further_T = other_T.where(is_new_T, further_T)
        own_TK = torch.cat([own_TK, further_T[:, None]], 1)
    return own_TK


# ---------------------------------------------------------------------- what a load makes


def counts_of(
    load: Load, place: Place, tokens: Sequence[int], phase: int, chunks: int = 1
) -> Tensor:
    """[P, senders, E] copies. tokens: of each rank."""
    found = []
    for rank, own in enumerate(tokens):
        ids_TK = ids_of(load, place, rank, own, phase)
        size = -(-own // chunks)
        parts = [ids_TK[p * size : (p + 1) * size].flatten() for p in range(chunks)]
        found.append(
            torch.stack([torch.bincount(part, minlength=place.num_experts) for part in parts])
        )
    return torch.stack(found, 1)


def imbalance(load: Load, place: Place, sequences: int, seq_len: int) -> dict[str, float]:
    """Return the copies of the busiest rank, those of the busiest expert, and the tokens of the
    rank that has the most, each over its mean: of the most uneven phase, or the median of recorded
    routings."""
    tokens = [seq_len * own for own in sequences_of(load, sequences, place.ranks)]
    found = []
    for phase in range(load.phases(place.ranks)):
        counts_1E = counts_of(load, place, tokens, phase).sum(1)
        found.append(
            [load_max(counts_1E, parts).item() for parts in (place.ranks, place.num_experts)]
        )
    of = middle if load.kind == "recorded" else max
    ranks, experts = (of(own) for own in zip(*found, strict=True))
    return {
        "max_over_mean_ranks": ranks,
        "max_over_mean_experts": experts,
        "max_over_mean_tokens": max(tokens) * place.ranks / sum(tokens),
    }
