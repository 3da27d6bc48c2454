"""A pair of blocks with 1,024 tokens of width 512 a rank, played on ranks with links of 115 Mbit/s
(schedule/play.py).

Attention takes 90 ms and an MLP 30 ms; backward computes twice as long and sends the same rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from scmoe.blocks.moe_block import MoEBlock
from scmoe.models.halves import Halves
from scmoe.planning.pricing import OPERATORS, Sample, layer_seconds, operator_names
from scmoe.schedule.cost import OperatorTimes, per_chunk
from scmoe.schedule.play import (
    BEFORE,
    TRANSFERS,
    Share,
    Span,
    elapsed,
    mirror,
    order_of,
    play,
    shares,
)
from scmoe.schedule.schedule import ATTENTION_PARTS, POSITIONS_OF, SUBLAYERS, Schedule

EVERY_OPERATOR = (
    *("route", "encode", "dispatch", "experts", "combine", "decode"),
    *("attention", *ATTENTION_PARTS, "mlp", "shared_expert", "current", BEFORE),
)
# A pair whose window and transfers take 50 ms each in forward, in 1 and 2 chunks; no backward.
WINDOW_OF_50_MS = dict.fromkeys(
    (1, 2),
    OperatorTimes(
        {
            **dict.fromkeys(("route", "encode", "decode"), 0.001),
            **dict.fromkeys(("dispatch", "combine"), 0.025),
            **dict.fromkeys(("mlp", "shared_expert", "experts"), 0.01),
            "attention": 0.03,
        }
    ),
)
EVERY_WIRING = [
    (architecture, position)
    for architecture, positions in POSITIONS_OF.items()
    for position in positions or (None,)
]
ROW_MS = 512 * 4 * 8 / (115e6 * 1448 / 1514) * 1e3  # payload of a frame


def hot_rank(load: float, ranks: int, hot: int = 0) -> list[Share]:
    """Return the shares where the rank `hot` gets `load` times its fair share of every rank's
    rows."""
    row = [(1 - load / ranks) / (ranks - 1)] * ranks
    row[hot] = load / ranks
    return shares([row] * ranks)


def operator_ms(schedule: Schedule, ranks: int, latency_ms: float = 0.0) -> OperatorTimes:
    """Return the times of all operators with even rows. latency_ms: of each chunk's transfer."""
    top_k = 2 if schedule.architecture == "top_k" else 1
    transfer = top_k * 1024 * (1 - 1 / ranks) * ROW_MS + latency_ms * schedule.chunks
    forward = {
        "attention": 90.0,
        "attention_core": 72.0,
        "attention_out": 18.0,
        "mlp": 30.0,
        "shared_expert": 30.0,
        "experts": 30.0 * top_k,
    }
    backward = {operator: 2 * ms for operator, ms in forward.items()}
    return OperatorTimes(
        *(times | dict.fromkeys(TRANSFERS, transfer) for times in (forward, backward))
    )


def play_step(
    schedule: Schedule, rows: Sequence[Share], sequential: bool = False, latency_ms: float = 0.0
) -> tuple[list[list[Span]], list[list[Span]]]:
    """Return the spans of each rank in forward, and in backward, which begins on each rank where
    its forward ends."""
    times = operator_ms(schedule, len(rows), latency_ms)
    before = SUBLAYERS[: 3 - schedule.sublayers_after_tap]
    directions = [
        per_chunk(schedule, {**each, BEFORE: sum(each[operator] for operator in before)})
        for each in (times.forward, times.backward)
    ]
    forward_order = order_of([schedule], sequential=sequential)
    # backward is played as a block behind the first one
    backward_order = [action._replace(layer=1) for action in mirror(forward_order)]
    order = [*forward_order, *backward_order]
    spans_R = play(order, directions, [[rows] * schedule.chunks] * 2)
    forward, backward = (
        [[span for span in spans if span.layer == direction] for spans in spans_R]
        for direction in (0, 1)
    )
    return forward, backward


def step_ms(
    schedule: Schedule, rows: Sequence[Share], sequential: bool = False, latency_ms: float = 0.0
) -> tuple[float, float]:
    """Return the time of forward, and of the whole training step, of the slowest rank."""
    forward, backward = play_step(schedule, rows, sequential, latency_ms)
    return max(map(elapsed, forward)), max(map(elapsed, backward))


def sample_of(
    schedule: Schedule, rows: Sequence[Share], sequential: bool, latency_ms: float = 0.0
) -> Sample:
    """Return what `pricing.measured` returns after this step of one layer, in ms."""
    forward, backward = play_step(schedule, rows, sequential, latency_ms)
    window = len(schedule.operators())
    times_RdN2 = [
        [in_order(before[-window:], schedule), in_order(after[:window], schedule)]
        for before, after in zip(forward, backward, strict=True)
    ]
    return Sample.stacked(
        [layer_seconds(torch.tensor([times_RdN2], dtype=torch.float64), schedule)]
    )


def in_order(spans: Sequence[Span], schedule: Schedule) -> list[tuple[float, float]]:
    """Return start and end of each span, in the order of `noted`; nothing is before the tap."""
    times = {
        op: [(span.start, span.end) for span in spans if span.operator == op] for op in OPERATORS
    }
    tap = spans[0].start
    return [*(times[op].pop(0) for op in operator_names(schedule)), (tap, tap)]


def played_model(*schedules: Schedule) -> nn.Module:
    """Return a model that can have two batches in flight, with a block of each schedule."""
    return nn.ModuleList([Halves(), *map(PlayedBlock, schedules)])


class PlayedBlock(MoEBlock):
    """A block that has a schedule and computes nothing."""

    def __init__(self, schedule: Schedule) -> None:
        nn.Module.__init__(self)
        self.schedule = schedule
        self.moe = SimpleNamespace(dispatcher=None)  # type: ignore[assignment]

    @property
    def divided(self) -> Schedule:
        slots = self.schedule.attentions
        return (
            replace(self.schedule, expert_slot=slots[0], inside_attention=True)
            if slots
            else self.schedule
        )

    def run_as(self, schedule: Schedule, dispatcher: Any, recorder: Any = None) -> None:
        self.schedule = schedule
