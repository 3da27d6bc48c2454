"""An optimizer step of a model on a machine, played from the times of its operators; a forward pass
likewise.

    computation   before 1 | stream and window of 1 | before 2 | ... | head | head' | ... | update
    link, rows             | dispatch | combine     |          | ...
    link, sums                                              dense gradients beside rows and in gaps

A block is played as the benches' timelines are (schedule/cost.py; two batches in flight:
schedule/stack.py). What is added here:

    sums        the gradients of an operator are ready when its backward has ended on the last half.
                They share the link with rows (shared_link.py). What is left after backward is
                exposed. They are summed once a step, with the last batch
    pieces      a chunk or a half takes its share of an operator's rows, but as many kernels as all
                rows, and the experts read all their weights: t = max((all - fixed) / pieces, least)
                + fixed. A half reads the weights of attention, MLP and shared expert again too,
                which timed_blocks.py leaves out: their `least` is 0
    burst       an idle link may have saved a part of the next transfer (token_bucket.py)
    tax         computation is slower by this share of the time that a transfer runs beside it
    step        batches x (forward + backward) + exposed sums + update + what no operator explains

With one batch in flight, an uneven load is played with the rows of each rank (`play_ranks`). With
two, every transfer takes as long as that of the busiest direction of all ranks, and the experts as
long as those of the busiest rank. Left out: how the tax moves later transfers, and sums of weights
that are split over ranks (FSDP).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, NamedTuple

from scmoe.predict.played_load import Load, busiest, dominant
from scmoe.predict.shared_link import SharedLink, Sum, Waiting, left_at
from scmoe.predict.token_bucket import TokenBucket
from scmoe.schedule.cost import EVEN, PER_CHUNK, TRANSFERS, OperatorTimes, Span, play_ranks
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.stack import BEFORE, order_of, play_order

Direction = Literal["forward", "backward"]
NOTHING = OperatorTimes({})


@dataclass(frozen=True, eq=False)
class Block:
    """A block with an MoE, and what the ranks do for it.

    times: seconds of every operator for all rows of one batch, in one piece, with BEFORE: all that
    is computed between the preceding block's end and the tap. fixed: seconds of each operator that
    every piece takes whatever its rows are: kernel launches, a transfer's latency. least: seconds
    that a piece takes at least beside these: reading the weights. sums: of gradients.
    """

    schedule: Schedule
    times: OperatorTimes
    sums: Sequence[Sum] = ()
    fixed: OperatorTimes = NOTHING
    least: OperatorTimes = NOTHING

    @property
    def chunks(self) -> int:
        return self.schedule.chunks


@dataclass(frozen=True)
class Head:
    """What is computed after the last block with an MoE, in seconds for all rows of one batch."""

    forward: float = 0.0
    backward: float = 0.0
    sums: Sequence[Sum] = ()  # their operator is not read, their part is that of `backward`


@dataclass(frozen=True)
class Setting:
    """How a step runs.

    batches_in_flight: 2: halves in turns. sequential: transfers as Blocking has them.
    accumulate: batches of a step. sums_at_once: that share the link with a transfer of rows.
    burst: seconds of transfers that an idle link saves at most (token_bucket.py). tax: what
    computation loses of the time that a transfer runs beside it. longer: by what factor
    computing all rows takes longer in two halves, beside launches and weights. update_s, other_s:
    seconds of a step.
    """

    batches_in_flight: Literal[1, 2] = 1
    sequential: bool = False
    accumulate: int = 1
    sums_at_once: int = 1
    burst: float = 0.0
    tax: float = 0.0
    longer: float = 1.0
    update_s: float = 0.0
    other_s: float = 0.0

    def __post_init__(self) -> None:
        if self.sequential and self.batches_in_flight == 2:
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
        return (
            self.computing
            + self.exposed_rows
            + self.exposed_gradients
            + self.slowed
            + self.update
            + self.other
        )


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


def simulate_step(
    blocks: Sequence[Block],
    setting: Setting,
    head: Head | None = None,
    loads: Sequence[Load] | None = None,
) -> StepTime:
    """Return the time of an optimizer step.

    loads: of each block, of a batch on each rank; None: even. Equal blocks and loads are played
    faster if they are the same object.
    """
    head = head or Head()
    forward = play_pass(blocks, "forward", setting, head, loads)
    last = play_pass(blocks, "backward", setting, head, loads)
    others = last
    if setting.accumulate > 1:
        without = {id(block): replace(block, sums=()) for block in blocks}
        unsummed = [without[id(block)] for block in blocks]
        others = play_pass(unsummed, "backward", setting, replace(head, sums=()), loads)
    passes = setting.accumulate * [forward] + (setting.accumulate - 1) * [others] + [last]
    hidden_sums = last.sums - last.exposed_sums
    return StepTime(
        computing=sum(each.computing for each in passes),
        exposed_rows=sum(each.exposed for each in passes),
        exposed_gradients=last.exposed_sums,
        slowed=setting.tax * (sum(each.hidden for each in passes) + hidden_sums),
        update=setting.update_s,
        other=setting.other_s,
    )


def simulate_forward(
    blocks: Sequence[Block],
    setting: Setting,
    head: Head | None = None,
    loads: Sequence[Load] | None = None,
) -> StepTime:
    """Return the time of one forward pass, as inference has it. Arguments: as `simulate_step`."""
    played = play_pass(blocks, "forward", setting, head or Head(), loads)
    return StepTime(played.computing, played.exposed, slowed=setting.tax * played.hidden)


# ---------------------------------------------------------------------- times of pieces


def piece_times(block: Block, direction: Direction, setting: Setting) -> dict[str, float]:
    """Return the seconds of each operator where it runs once: of a chunk, and of a half where two
    batches are in flight."""
    all_rows, fixed, least = (
        each.forward if direction == "forward" else each.backward
        for each in (block.times, block.fixed, block.least)
    )
    halves = setting.batches_in_flight
    seconds = {}
    for operator, whole in all_rows.items():
        chunks = block.schedule.chunks if operator in PER_CHUNK else 1
        slower = 1.0 if operator in TRANSFERS or halves == 1 else setting.longer
        once = min(whole, fixed.get(operator, 0.0))
        piece = (whole - once) / (halves * chunks) * slower
        if halves * chunks > 1:
            piece = max(piece, least.get(operator, 0.0))
        seconds[operator] = piece + once
    return seconds


# ---------------------------------------------------------------------- playing


def play_pass(
    blocks: Sequence[Block],
    direction: Direction,
    setting: Setting,
    head: Head,
    loads: Sequence[Load] | None,
) -> Pass:
    """Return a pass of one batch through all blocks and the head."""
    through = _halves if setting.batches_in_flight == 2 else _whole
    if direction == "forward":
        played = through(blocks, direction, setting, loads, ())
        return played._replace(
            computing=played.computing + head.forward, elapsed=played.elapsed + head.forward
        )
    # the blocks' backward begins at 0, after that of the head
    of_head = [Waiting((each.part - 1) * head.backward, each.seconds) for each in head.sums]
    played = through(blocks, direction, setting, loads, of_head)
    return Pass(
        played.computing + head.backward,
        played.elapsed + head.backward,
        played.carried,
        played.sums,
        played.end + head.backward,
    )


class PlayedBlock(NamedTuple):
    """A block on each rank. waiting: the sums that the link has not carried when the first rank
    has ended it, from then on. in_bucket: what the link has saved then. shorter: by how much its
    transfers are, in all, than at the link's rate; negative: longer, as they meet sums. sums:
    seconds of its own sums on the link."""

    spans_R: list[list[Span]]
    waiting: tuple[Waiting, ...]
    in_bucket: float
    shorter: float
    sums: float = 0.0


def _whole(
    blocks: Sequence[Block],
    direction: Direction,
    setting: Setting,
    loads: Sequence[Load] | None,
    waiting: Sequence[Waiting],
) -> Pass:
    """Return a pass with one batch in flight. All rows of a block have arrived at its end. waiting:
    sums of what has run before."""
    layers = list(range(len(blocks)))
    played: dict[Any, PlayedBlock] = {}
    shares: Load = []
    previous: Load | None = None
    starts = [0.0]
    computing = 0.0
    carried = 0.0
    sums = sum(each.seconds for each in waiting)
    time = 0.0  # from which on `waiting` and the bucket count
    bucket = TokenBucket(setting.burst)
    waiting = left_at(time, waiting, bucket)
    for layer in layers if direction == "forward" else reversed(layers):
        block = blocks[layer]
        load = None if loads is None else loads[layer]
        if load is None:
            shares = [[EVEN] for _ in range(block.schedule.chunks)]
        elif load is not previous:
            shares = dominant(load)
            starts = [max(starts) for _ in shares[0]]
        previous = load
        # a block begins without rows on the links, so it runs in the same way wherever ranks are as
        # much later than the first one and the same sums wait; times are rounded to find that again
        first = min(starts)
        late = tuple(round(start - first, 12) for start in starts)
        waiting = left_at(first - time, waiting, bucket)
        saved = round(bucket.saved_at(first - time), 12)
        key = id(block), id(load), late, waiting, saved
        if key not in played:
            played[key] = _play_block(block, direction, setting, shares, late, waiting, saved)
        of_block = played[key]
        ends = [spans[-1].end + first for spans in of_block.spans_R]
        slowest = of_block.spans_R[ends.index(max(ends))]
        computing += sum(s.end - s.start for s in slowest if not s.is_transfer)
        carried += sum(s.end - s.start for s in slowest if s.is_transfer) + of_block.shorter
        sums += of_block.sums
        waiting = of_block.waiting
        bucket = TokenBucket(setting.burst, of_block.in_bucket)
        starts = ends
        time = min(ends)
    end = time + SharedLink([], 1, 1, waiting).carry_sums(inf) if waiting else 0.0
    return Pass(computing, max(starts), carried, sums, end)


def _play_block(
    block: Block,
    direction: Direction,
    setting: Setting,
    shares: Load,
    starts: Sequence[float],
    waiting: Sequence[Waiting],
    saved: float,
) -> PlayedBlock:
    schedule = block.schedule
    times = piece_times(block, direction, setting)
    bucket = TokenBucket(setting.burst, saved)
    if direction == "forward":
        operators = (BEFORE, *schedule.operators())
        spans_R = play_ranks(operators, times, shares, setting.sequential, starts, bucket)
        first = min(spans[-1].end for spans in spans_R)
        return PlayedBlock(spans_R, (), bucket.saved_at(first), bucket.sent_at_once)
    operators = (*schedule.backward_operators(), BEFORE)
    link = SharedLink([block], 1, setting.sums_at_once, waiting, bucket)
    spans_R = play_ranks(operators, times, shares, setting.sequential, starts, link)
    first = min(spans[-1].end for spans in spans_R)
    left = link.left_at(first)
    shorter = bucket.sent_at_once - link.later
    return PlayedBlock(spans_R, left, bucket.saved_at(first), shorter, link.summed)


def _halves(
    blocks: Sequence[Block],
    direction: Direction,
    setting: Setting,
    loads: Sequence[Load] | None,
    waiting: Sequence[Waiting],
) -> Pass:
    """Return a pass with two batches in flight, of a batch that is cut into these. waiting: as of
    `_whole`."""
    times = [piece_times(block, direction, setting) for block in blocks]
    if loads is not None:
        times = [busiest(each, load) for each, load in zip(times, loads, strict=True)]
    order = order_of([block.schedule for block in blocks])
    bucket = TokenBucket(setting.burst)
    if direction == "forward":
        spans = [span for half in play_order(order, times, bucket) for span in half]
        return _pass_of(spans, bucket.sent_at_once)
    order = [step.mirrored() for step in reversed(order)]
    waiting_at_0 = left_at(0.0, waiting, bucket)
    link = SharedLink(blocks, 2, setting.sums_at_once, waiting_at_0, bucket)
    spans = [span for half in play_order(order, times, link) for span in half]
    played = _pass_of(spans, bucket.sent_at_once - link.later)
    return played._replace(
        sums=link.summed + sum(each.seconds for each in waiting), end=link.carry_sums(inf)
    )


def _pass_of(spans: Sequence[Span], shorter: float) -> Pass:
    """Return a pass without sums of gradients. shorter: as of PlayedBlock."""
    return Pass(
        computing=sum(s.end - s.start for s in spans if not s.is_transfer),
        elapsed=max((s.end for s in spans), default=0.0),
        carried=sum(s.end - s.start for s in spans if s.is_transfer) + shorter,
    )
