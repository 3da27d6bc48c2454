"""An optimizer step of a model on a machine, played from the times of its operators; a forward pass
likewise. The milliseconds of `scmoe advise` are from here (advised_rows.py).

    computation   before 1 | stream and window of 1 | before 2 | ... | head | head' | ... | update
    link, rows             | dispatch | combine     |          | ...
    link, sums                                              dense gradients beside rows and in gaps

All blocks are played on one timeline (schedule/play.py), as those of the benches are. What is added
here:

    sums        the gradients of an operator are ready when its backward has ended on the last half.
                They share the link with rows (shared_link.py). What is left after backward is
                exposed. They are summed with the last batch of a step, under FSDP with every batch
    pieces      a chunk or a half takes its share of an operator's rows, but as many kernels as all
                rows, and the experts read all their weights: t = max((all - fixed) / pieces, least)
                + fixed. Not counted: a half also reads the weights of attention, MLP and shared
                expert again (their `least` is 0)
    burst       an idle link may have saved a part of the next transfer (shared_link.py)
    tax         computation is slower by this share of the time that a transfer runs beside it
    step        batches x (forward + backward) + exposed sums + update + what no operator explains
    whole       the forward of a batch runs beside the backward of the batch before it. The first
                forward and the last backward run alone
    stages      of a pipeline: a step waits for as many batches more as there are other stages, of
                which each has a part where stages are virtual. No batch runs beside these

An uneven load is played with the rows of each rank that may be the slowest. Left out: how the tax
moves later transfers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from scmoe.moe.operators import Direction
from scmoe.predict.batches import InFlight
from scmoe.predict.shared_link import BlockSums, SharedLink, Sum, TokenBucket, Waiting
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.play import (
    BEFORE,
    PER_CHUNK,
    TRANSFERS,
    Action,
    Load,
    beside_backward,
    elapsed,
    mirror,
    order_of,
    play,
    slowest_ranks,
)
from scmoe.schedule.schedule import Schedule

NOTHING = OperatorTimes({})


@dataclass(frozen=True, eq=False)
class Block:
    """A block with an MoE, and what the ranks do for it.

    times: seconds of every operator for all rows of one batch, in one piece, with BEFORE: all that
    is computed between the preceding block's end and the tap. fixed: seconds of each operator that
    every piece takes whatever its rows are: kernel launches, a transfer's latency. least: seconds
    that a piece takes at least beside these: reading the weights. sums: of gradients. gathers:
    seconds in which the link gathers the block's weights before its forward.
    """

    schedule: Schedule
    times: OperatorTimes
    sums: Sequence[Sum] = ()
    fixed: OperatorTimes = NOTHING
    least: OperatorTimes = NOTHING
    gathers: float = 0.0

    @property
    def gathered(self) -> Sequence[Sum]:
        """What the link carries beside rows in forward."""
        return (Sum(self.gathers, BEFORE, 0.0),) if self.gathers else ()


@dataclass(frozen=True)
class Head:
    """What is computed after the last block with an MoE, in seconds for all rows of one batch. Of a
    pipeline: what makes its last stage longer than the others."""

    forward: float = 0.0
    backward: float = 0.0
    sums: Sequence[Sum] = ()  # their operator is not read, their part is that of `backward`


@dataclass(frozen=True)
class StepSetting:
    """How a step runs.

    batches: in flight. sequential: computation waits for transfers. accumulate: batches of a step.
    stages, virtual_stages: of a pipeline, and of each of them. sums_at_once: that share the link
    with a transfer of rows.
    burst: seconds of transfers that an idle link saves at most (shared_link.py). tax: what
    computation loses of the time that a transfer runs beside it. longer: by what factor a
    batch in two parts takes longer to compute than in one, launches and weights aside. update_s,
    other_s: seconds of a step.
    """

    batches: InFlight = InFlight.ONE
    sequential: bool = False
    accumulate: int = 1
    stages: int = 1
    virtual_stages: int = 1
    sums_at_once: int = 1
    burst: float = 0.0
    tax: float = 0.0
    longer: float = 1.0
    update_s: float = 0.0
    other_s: float = 0.0

    def __post_init__(self) -> None:
        if self.batches is InFlight.WHOLE and self.accumulate < 2:
            raise ValueError(
                f"{self.accumulate} batches of a step cannot be in flight two at a time. Use two or"
                " more."
            )
        if self.sequential and self.batches.number == 2:
            raise ValueError(
                "Transfers are sequential with two batches in flight. Choose one of the two: a half"
                " that waits right after a transfer's start hides nothing."
            )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step or of a forward pass, of the slowest rank; `total` is their sum.

    computing: all operators, without tax. slowed: by transfers beside them. exposed_rows: waiting
    for rows, with other ranks' experts where the load is uneven. exposed_gradients: sums after
    backward.
    """

    computing: float
    exposed_rows: float
    exposed_gradients: float = 0.0
    slowed: float = 0.0
    update: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        passes = self.computing + self.exposed_rows + self.exposed_gradients
        return passes + self.slowed + self.update + self.other


class Pass(NamedTuple):
    """A pass of one batch through all blocks in one direction, in seconds.

    carried: how long the link would carry its rows alone, at its rate. sums: how long it carries
    the sums of gradients. end: when the last of these has ended.
    """

    computing: float
    elapsed: float
    carried: float
    sums: float = 0.0
    end: float = 0.0

    @property
    def exposed(self) -> float:
        return max(0.0, self.elapsed - self.computing)

    @property
    def hidden(self) -> float:
        return max(0.0, self.carried - self.exposed)

    @property
    def exposed_sums(self) -> float:
        return max(0.0, self.end - self.elapsed)

    @property
    def beside(self) -> float:
        """Return how long transfers run beside computation."""
        return self.hidden + self.sums - self.exposed_sums


def simulate_step(
    blocks: Sequence[Block],
    setting: StepSetting,
    head: Head | None = None,
    loads: Sequence[Load] | None = None,
) -> StepTime:
    """Return the time of an optimizer step.

    loads: of each block, of a batch on each rank; None: even."""
    head = head or Head()
    batches = setting.accumulate
    # gradients of weights that are split are summed with every batch, others with the last one
    is_split = any(block.gathers for block in blocks)
    unsummed = blocks if is_split else [replace(block, sums=()) for block in blocks]
    unsummed_head = head if is_split else replace(head, sums=())
    forward = play_pass(blocks, "forward", setting, head, loads)
    backward = play_pass(unsummed, "backward", setting, unsummed_head, loads)
    last = play_pass(blocks, "backward", setting, head, loads)
    if setting.batches is InFlight.WHOLE:
        both = play_beside_backward(unsummed, setting, unsummed_head, loads)
        passes = [forward, *(batches - 1) * [both], last]
    else:
        passes = [*batches * [forward], *(batches - 1) * [backward], last]
    of_other_stages = forward.elapsed + backward.elapsed - head.forward - head.backward
    of_other_stages += setting.tax * (forward.beside + backward.beside)
    waited_for = (setting.stages - 1) / setting.virtual_stages * of_other_stages
    return StepTime(
        computing=sum(each.computing for each in passes),
        exposed_rows=sum(each.exposed for each in passes),
        exposed_gradients=sum(each.exposed_sums for each in passes),
        slowed=setting.tax * sum(each.beside for each in passes),
        update=setting.update_s,
        other=setting.other_s + waited_for,
    )


def simulate_forward(
    blocks: Sequence[Block],
    setting: StepSetting,
    head: Head | None = None,
    loads: Sequence[Load] | None = None,
) -> StepTime:
    """Return the time of one forward pass, as inference has it, through all stages of a pipeline.
    Arguments: as `simulate_step`."""
    head = head or Head()
    played = play_pass(blocks, "forward", setting, head, loads)
    slowed = setting.tax * played.beside
    return StepTime(
        computing=played.computing,
        exposed_rows=played.exposed,
        exposed_gradients=played.exposed_sums,
        slowed=slowed,
        other=(setting.stages - 1) * (played.elapsed - head.forward + slowed),
    )


# ---------------------------------------------------------------------- times of pieces


def piece_times(block: Block, direction: Direction, setting: StepSetting) -> dict[str, float]:
    """Return the seconds of each operator where it runs once: of a chunk, and of a half where two
    batches are in flight."""
    all_rows, fixed, least = (
        each.forward if direction == "forward" else each.backward
        for each in (block.times, block.fixed, block.least)
    )
    pieces = setting.batches.pieces
    seconds = {}
    for operator, whole in all_rows.items():
        chunks = block.schedule.chunks if operator in PER_CHUNK else 1
        slower = 1.0 if operator in TRANSFERS or pieces == 1 else setting.longer
        once = min(whole, fixed.get(operator, 0.0))
        piece = (whole - once) / (pieces * chunks) * slower
        if pieces * chunks > 1:
            piece = max(piece, least.get(operator, 0.0))
        seconds[operator] = piece + once
    return seconds


# ---------------------------------------------------------------------- playing


def play_pass(
    blocks: Sequence[Block],
    direction: Direction,
    setting: StepSetting,
    head: Head,
    loads: Sequence[Load] | None,
) -> Pass:
    """Return a pass of one batch through all blocks and the head."""
    times = [piece_times(block, direction, setting) for block in blocks]
    schedules = [block.schedule for block in blocks]
    order = order_of(schedules, setting.batches.pieces, setting.sequential)
    if direction == "forward":
        link = link_of(gathering(blocks), setting)
        return played(order, times, link, head.forward, loads)
    link = link_of(blocks, setting, waiting_sums(head))
    return played(mirror(order), times, link, head.backward, loads)


def play_beside_backward(
    blocks: Sequence[Block], setting: StepSetting, head: Head, loads: Sequence[Load] | None
) -> Pass:
    """Return the forward of a batch beside the backward of the batch before it."""
    forward = [piece_times(block, "forward", setting) for block in blocks]
    backward = [piece_times(block, "backward", setting) for block in blocks]
    order = beside_backward([block.schedule for block in blocks])
    link = link_of([*gathering(blocks), *blocks], setting, waiting_sums(head))
    both_loads = None if loads is None else [*loads, *loads]
    return played(order, [*forward, *backward], link, head.forward + head.backward, both_loads)


def played(
    order: Sequence[Action],
    times: Sequence[Mapping[str, float]],
    link: SharedLink,
    head_s: float,
    loads: Sequence[Load] | None,
) -> Pass:
    shares = None if loads is None else slowest_ranks(loads)
    slowest = max(play(order, times, shares, link), key=elapsed)
    seconds = {True: 0.0, False: 0.0}
    for span in slowest:
        seconds[span.is_transfer] += span.end - span.start
    return Pass(
        computing=seconds[False] + head_s,
        elapsed=elapsed(slowest) + head_s,
        carried=seconds[True] + link.bucket.sent_at_once - link.later,
        sums=link.summed,
        end=link.carry_sums(inf) + head_s,
    )


def link_of(
    blocks: Sequence[Block], setting: StepSetting, waiting: Sequence[Waiting] = ()
) -> SharedLink:
    sums = [BlockSums(block.sums, block.schedule.chunks) for block in blocks]
    bucket = TokenBucket(setting.burst)
    return SharedLink(sums, setting.batches.pieces, setting.sums_at_once, waiting, bucket)


def gathering(blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks with what the link carries for them in forward."""
    return [replace(block, sums=block.gathered) for block in blocks]


def waiting_sums(head: Head) -> list[Waiting]:
    """Return the sums of the head's gradients. The blocks' backward begins at 0, after its own."""
    return [Waiting((each.part - 1) * head.backward, each.seconds) for each in head.sums]
