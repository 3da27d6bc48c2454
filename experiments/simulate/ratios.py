"""The model of docs/decisions/0044-paper-cells.md, which predicts the ratios that the paper prints.

All times are in MLPs: one MLP's forward of the studied stage. The step is computed in two ways. The
closed form holds for one chunk and is fast enough for a fit; the timeline plays the operators, in
any number of chunks. Both give the same time with one chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from scmoe.schedule.cost import TRANSFERS, elapsed, per_chunk, play
from scmoe.schedule.schedule import Schedule

Kind = Literal["train", "infer"]
CHUNKS = (1, 2, 4, 8)
PIPELINED = "_pipelined"
BACKWARD = 2  # backward computes this many times as much as forward


@dataclass(frozen=True)
class Parameters:
    """The names are those of the decision.

    beta: a copy's transfer at D = 1024. lat: what a transfer costs besides. attn: an attention's
    time over that of its FLOPs. g: fixed cost of a module. u: what a training step has besides,
    over forward's computation. padded: rows of an expert over the routed ones. shared_hides: the
    shared-expert row's transfers run beside its shared expert.
    """

    beta: float = 1.0
    lat: float = 0.0
    attn: float = 1.0
    g: float = 0.0
    u: float = 0.0
    padded: float = 1.0
    shared_hides: bool = False


@dataclass(frozen=True)
class Sizes:
    """A model's FLOPs, in those of one MLP of the studied stage.

    attention: one attention. width: D / 1024 times an MLP's FLOPs over 16 D^2. units: studied pairs
    of blocks, or blocks of a model with an MoE in every block (`every` 1). rest_attention,
    rest_mlp: all other blocks, and the head. rest_modules: top-2 modules of these other blocks, and
    rest_bytes their bytes of a row over those of the studied stage, times its tokens.
    """

    attention: float
    width: float
    units: int
    every: int = 2
    rest_attention: float = 0.0
    rest_mlp: float = 0.0
    rest_modules: int = 0
    rest_bytes: float = 0.0


def attention_flops(dim: int, visible: int, kv_heads: float = 1.0) -> float:
    """Return an attention's FLOPs of a token. kv_heads: over the heads."""
    return 4 * dim**2 * (1 + kv_heads) + 4 * visible * dim


def language_model(
    layers: int, dim: int, vocabulary: int, every: int, mlp_flops: float, kv_heads: float = 1.0
) -> Sizes:
    """Return the sizes of a model of Table 8, whose contexts have 2048 tokens."""
    return Sizes(
        attention=attention_flops(dim, 2048, kv_heads) / mlp_flops,
        width=dim / 1024 * mlp_flops / (16 * dim**2),
        units=layers // every,
        every=every,
        rest_mlp=2 * dim * vocabulary / mlp_flops,
    )


def swin(dim: int, image: int, window: int) -> Sizes:
    """Return the sizes of SwinV2 (Table 9), whose stages have 2, 2, 18 and 2 blocks.

    A stage has twice the width and a quarter of the tokens of the one before, so all MLPs have the
    same FLOPs. Stage 4 is one pair.
    """
    flops = []
    for stage in range(4):
        side = min(window, image // (4 * 2**stage))
        width = dim * 2**stage
        flops.append(attention_flops(width, side**2) / (16 * width**2))
    return Sizes(
        attention=flops[2],
        width=4 * dim / 1024,
        units=9,
        rest_attention=2 * (flops[0] + flops[1] + flops[3]),
        rest_mlp=2 + 2 + 1,
        rest_modules=1,
        rest_bytes=0.5,
    )


MODELS: Mapping[str, Sizes] = {
    "swinv2_moe_s": swin(dim=96, image=192, window=12),
    "gpt2_moe_medium": language_model(24, 1024, 50257, 2, 16 * 1024**2),
    "gpt3_moe_xl": language_model(24, 2048, 50257, 2, 16 * 2048**2),
    "llama2_moe": language_model(24, 2048, 32000, 1, 6 * 2048 * 5376, kv_heads=0.25),
}


@dataclass(frozen=True)
class Row:
    """A row of a table. copies: routed experts of a token."""

    architecture: str
    position: str | None = None
    copies: int = 1

    def schedules(self, chunks: int) -> list[Schedule]:
        window = Schedule(self.architecture, self.position).window
        return [
            Schedule(self.architecture, self.position, slot, chunks)
            for slot in range(len(window) + 1)
        ]


ROWS: Mapping[str, Row] = {
    "top1": Row("top_k"),
    "top2": Row("top_k", copies=2),
    "top3": Row("top_k", copies=3),
    "shared_expert": Row("shared_expert"),
    "scmoe_pos1": Row("scmoe", "pos1"),
    "scmoe_pos2": Row("scmoe", "pos2"),
    "scmoe_pos3": Row("scmoe", "pos3"),
    "scmoe2_pos2": Row("scmoe", "pos2", copies=2),
}


def transfer(sizes: Sizes, copies: int, p: Parameters) -> float:
    return copies * p.beta / sizes.width + p.lat


def operators(sizes: Sizes, copies: int, p: Parameters) -> dict[str, float]:
    """Return the times of a unit's operators in forward."""
    return {
        "attention": p.attn * sizes.attention,
        "mlp": 1.0,
        "shared_expert": 1.0,
        "route": p.g / 3,
        "encode": p.g / 3,
        "dispatch": transfer(sizes, copies, p),
        "experts": copies * p.padded,
        "combine": transfer(sizes, copies, p),
        "decode": p.g / 3,
    }


def module_share(sizes: Sizes, p: Parameters) -> float:
    """Return the transfers' share of a sequential top-2 module's time in forward."""
    transfers = 2 * transfer(sizes, 2, p)
    return transfers / (transfers + 2 * p.padded + p.g)


def at_share(sizes: Sizes, share: float, p: Parameters) -> Parameters:
    """Return the parameters with the `beta` at which `module_share` is `share`."""
    transfers = share / (1 - share) * (2 * p.padded + p.g)
    beta = (transfers / 2 - p.lat) * sizes.width / 2
    if beta <= 0:
        raise ValueError(f"A share of {share} is below that of `lat`. Choose a larger share")
    return replace(p, beta=beta)


@dataclass(frozen=True)
class Times:
    """Times of a step. exposed: of a unit's transfers, what computation does not cover.
    transfers: of a unit."""

    step: float
    exposed: float
    transfers: float

    @property
    def hidden(self) -> float:
        return 1 - self.exposed / self.transfers


def unit_computation(sizes: Sizes, row: Row, p: Parameters) -> float:
    """Return the computation of a unit in forward."""
    times = operators(sizes, row.copies, p)
    backbone = sizes.every * times["attention"]
    if sizes.every == 2:
        backbone += times["mlp"]
    if "shared_expert" in row.schedules(1)[0].window:
        backbone += times["shared_expert"]
    return backbone + times["experts"] + p.g


def rest_of(sizes: Sizes, p: Parameters) -> tuple[float, float]:
    """Return the computation and the transfers of the other blocks in forward, for one studied
    unit. The transfers are waited for."""
    modules = sizes.rest_modules * (2 * p.padded + p.g)
    computation = p.attn * sizes.rest_attention + sizes.rest_mlp + modules
    rows = 2 * sizes.rest_modules * (2 * p.beta / sizes.width * sizes.rest_bytes + p.lat)
    return computation / sizes.units, rows / sizes.units


def waits(row: Row, p: Parameters) -> bool:
    """Return whether a row in one chunk waits for each transfer."""
    return row.architecture == "top_k" or (
        row.architecture == "shared_expert" and not p.shared_hides
    )


def step_in_closed_form(
    sizes: Sizes, row: Row, kind: Kind, p: Parameters, pair: bool = False
) -> Times:
    """Return the times with one chunk: each direction is its computation and the parts of the
    transfers that its backbone does not cover. pair: one unit alone, without the rest."""
    times = operators(sizes, row.copies, p)
    duration = times["dispatch"]
    directions = (1,) if kind == "infer" else (1, BACKWARD)
    exposed = 2.0 * duration * len(directions)
    if not waits(row, p):
        exposed = min(
            sum(uncovered(schedule, times, duration, factor) for factor in directions)
            for schedule in row.schedules(1)
        )
    return step_of(sizes, row, kind, p, pair, exposed)


def uncovered(
    schedule: Schedule, times: Mapping[str, float], duration: float, factor: float
) -> float:
    """Return what a direction waits for. factor: of its computation over forward's."""
    before, after = schedule.around_experts
    return max(0.0, duration - factor * sum(times[name] for name in before)) + max(
        0.0, duration - factor * sum(times[name] for name in after)
    )


def step_of(sizes: Sizes, row: Row, kind: Kind, p: Parameters, pair: bool, exposed: float) -> Times:
    """Return the times of a step whose units wait for `exposed`."""
    directions = (1,) if kind == "infer" else (1, BACKWARD)
    computation = unit_computation(sizes, row, p)
    rest, rest_rows = (0.0, 0.0) if pair else rest_of(sizes, p)
    step = sum(directions) * (computation + rest) + exposed + len(directions) * rest_rows
    if kind == "train":
        step += p.u * (computation + rest)
    transfers = 2 * transfer(sizes, row.copies, p) * len(directions)
    return Times(step, exposed, transfers)


def step_played(sizes: Sizes, name: str, kind: Kind, p: Parameters, pair: bool = False) -> Times:
    """Return the times of a row's best schedule on the timeline. name: of ROWS; with PIPELINED it
    may use several chunks."""
    row = ROWS[name.removesuffix(PIPELINED)]
    chunks = CHUNKS if name.endswith(PIPELINED) else (1,)
    choices = [
        step_of(sizes, row, kind, p, pair, played(schedule, sizes, row, kind, p))
        for count in chunks
        for schedule in row.schedules(count)
    ]
    return min(choices, key=lambda times: times.step)


def played(schedule: Schedule, sizes: Sizes, row: Row, kind: Kind, p: Parameters) -> float:
    """Return how long a unit waits for transfers under a schedule."""
    forward = operators(sizes, row.copies, p)
    backward = {name: t if name in TRANSFERS else BACKWARD * t for name, t in forward.items()}
    played_directions = [(schedule.operators(), forward)]
    if kind == "train":
        played_directions.append((schedule.backward_operators(), backward))

    sequential = schedule.chunks == 1 and waits(row, p)
    waited = 0.0
    for order, times in played_directions:
        spans = play(order, per_chunk(schedule, times), sequential)
        busy = sum(span.end - span.start for span in spans if not span.is_transfer)
        waited += elapsed(spans) - busy
    return waited
