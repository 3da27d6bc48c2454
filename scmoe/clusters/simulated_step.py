"""An optimizer step of a model on a machine, played from the times of its operators; a forward pass
likewise.

    computation   before 1 | stream and window of 1 | before 2 | ... | head | head' | ... | update
    link, rows             | dispatch | combine     |          | ...
    link, sums                                                           dense gradients in the gaps

A block is played as the benches' timelines are (schedule/cost.py; two batches in flight:
schedule/stack.py). What is added here:

    sums        the gradients of an operator are ready when its backward has ended on the last half.
                They are summed in this order, where the link carries no rows: rows come first. What
                is left after backward is exposed. They are summed once a step, with the last batch
    pieces      a chunk or a half takes its share of an operator's rows, but as many launches as all
                rows, and the experts read all their weights: t = max((all - fixed) / pieces, least)
                + fixed. A half reads the weights of attention, MLP and shared expert again too,
                which timed_blocks.py leaves out: their `least` is 0
    tax         computation is slower by this share of the time that a transfer runs beside it
    step        batches x (forward + backward) + exposed sums + update + what no operator explains

With one batch in flight, an uneven load is played with the rows of each rank (`play_ranks`). With
two, every transfer takes as long as that of the busiest direction of all ranks, and the experts as
long as those of the busiest rank. Left out: how the tax moves later transfers, and sums of weights
that are split over ranks (FSDP).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from scmoe.clusters.played_load import Load, busiest, dominant
from scmoe.schedule.cost import EVEN, PER_CHUNK, TRANSFERS, OperatorTimes, Span, play_ranks
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.stack import BEFORE, order_of, play_order

Direction = Literal["forward", "backward"]
NOTHING = OperatorTimes({})


class Sum(NamedTuple):
    """A sum of gradients over ranks. It can begin when a part of an operator's backward is over."""

    seconds: float  # on the link
    operator: str  # of the block; each time that it runs has such a sum
    part: float = 1.0  # BEFORE has several sub-layers: the share of its backward up to this one


@dataclass(frozen=True, eq=False)
class Block:
    """A block with an MoE, and what the ranks do for it.

    times: seconds of every operator for all rows of one batch, in one piece, with BEFORE: all that
    is computed between the preceding block's end and the tap. fixed: seconds of each operator that
    every piece takes whatever its rows are: launches, a transfer's latency. least: seconds that a
    piece takes at least beside these: reading the weights. sums: of gradients.
    """

    schedule: Schedule
    times: OperatorTimes
    sums: Sequence[Sum] = ()
    fixed: OperatorTimes = NOTHING
    least: OperatorTimes = NOTHING


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
    accumulate: batches of a step. tax: what computation loses of the time that a transfer runs
    beside it. longer: by what factor computing all rows takes longer in two halves, beside launches
    and weights. update_s, other_s: seconds of a step.
    """

    batches_in_flight: Literal[1, 2] = 1
    sequential: bool = False
    accumulate: int = 1
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

    rows: when the link carries some, in order, not overlapping. ready: the sums, and when each may
    begin.
    """

    computing: float
    elapsed: float
    rows: list[tuple[float, float]]
    ready: list[tuple[float, float]]

    @property
    def exposed(self) -> float:
        return max(0.0, self.elapsed - self.computing)

    @property
    def hidden(self) -> float:
        carried = sum(end - begin for begin, end in self.rows)
        return max(0.0, carried - self.exposed)


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
    backward = play_pass(blocks, "backward", setting, head, loads)
    sums = sum(seconds for _, seconds in backward.ready)
    exposed = max(0.0, sums_end(backward) - backward.elapsed)
    hidden_rows = setting.accumulate * (forward.hidden + backward.hidden)
    return StepTime(
        computing=setting.accumulate * (forward.computing + backward.computing),
        exposed_rows=setting.accumulate * (forward.exposed + backward.exposed),
        exposed_gradients=exposed,
        slowed=setting.tax * (hidden_rows + sums - exposed),
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
    played = through(blocks, direction, setting, loads)
    if direction == "forward":
        return Pass(played.computing + head.forward, played.elapsed + head.forward, played.rows, [])
    before = head.backward  # the blocks' backward begins after that of the head
    of_head = [(each.part * before, each.seconds) for each in head.sums]
    return Pass(
        played.computing + before,
        played.elapsed + before,
        [(begin + before, end + before) for begin, end in played.rows],
        of_head + [(ready + before, seconds) for ready, seconds in played.ready],
    )


def _whole(
    blocks: Sequence[Block], direction: Direction, setting: Setting, loads: Sequence[Load] | None
) -> Pass:
    """Return a pass with one batch in flight. All rows of a block have arrived at its end."""
    layers = list(range(len(blocks)))
    played: dict[Any, list[list[Span]]] = {}
    shares: Load = []
    previous: Load | None = None
    starts = [0.0]
    computing = 0.0
    rows: list[tuple[float, float]] = []
    ready: list[tuple[float, float]] = []
    for layer in layers if direction == "forward" else reversed(layers):
        block = blocks[layer]
        load = None if loads is None else loads[layer]
        if load is None:
            shares = [[EVEN] for _ in range(block.schedule.chunks)]
        elif load is not previous:
            shares = dominant(load)
            starts = [max(starts) for _ in shares[0]]
        previous = load
        # a block begins with free links, so it runs in the same way wherever ranks are as much
        # later than the first one; times are rounded to find that again
        first = min(starts)
        late = tuple(round(start - first, 12) for start in starts)
        key = id(block), id(load), late
        if key not in played:
            played[key] = _play_block(block, direction, setting, shares, late)
        spans_R = played[key]
        ends = [spans[-1].end + first for spans in spans_R]
        slowest = spans_R[ends.index(max(ends))]
        computing += sum(s.end - s.start for s in slowest if not s.is_transfer)
        rows += [(s.start + first, s.end + first) for s in slowest if s.is_transfer]
        if direction == "backward":
            ready += [(t + first, seconds) for t, seconds in sums_of(block, [slowest])]
        starts = ends
    return Pass(computing, max(starts), joined(rows), ready)


def _play_block(
    block: Block, direction: Direction, setting: Setting, shares: Load, starts: Sequence[float]
) -> list[list[Span]]:
    schedule = block.schedule
    operators = (BEFORE, *schedule.operators())
    if direction == "backward":
        operators = (*schedule.backward_operators(), BEFORE)
    times = piece_times(block, direction, setting)
    return play_ranks(operators, times, shares, setting.sequential, starts)


def _halves(
    blocks: Sequence[Block], direction: Direction, setting: Setting, loads: Sequence[Load] | None
) -> Pass:
    """Return a pass with two batches in flight, of a batch that is cut into these."""
    order = order_of([block.schedule for block in blocks])
    if direction == "backward":
        order = [step.mirrored() for step in reversed(order)]
    times = [piece_times(block, direction, setting) for block in blocks]
    if loads is not None:
        times = [busiest(each, load) for each, load in zip(times, loads, strict=True)]
    spans_2 = play_order(order, times)
    by_layer: list[list[list[Span]]] = [[[], []] for _ in blocks]
    for half, spans in enumerate(spans_2):
        steps = [step for step in order if step.half == half and step.kind != "wait"]
        for step, span in zip(steps, spans, strict=True):
            by_layer[step.layer][half].append(span)
    every = [span for spans in spans_2 for span in spans]
    return Pass(
        computing=sum(s.end - s.start for s in every if not s.is_transfer),
        elapsed=max((s.end for s in every), default=0.0),
        rows=joined([(s.start, s.end) for s in every if s.is_transfer]),
        ready=[
            each
            for block, halves in zip(blocks, by_layer, strict=True)
            for each in sums_of(block, halves)
            if direction == "backward"
        ],
    )


def sums_of(block: Block, halves: Sequence[Sequence[Span]]) -> Iterator[tuple[float, float]]:
    """Yield when each sum of a block's gradients may begin, and its seconds. halves: the spans of
    each half of a batch in backward."""
    runs: dict[str, list[Span]] = defaultdict(list)
    # an operator of several chunks has its gradients when the last one has ended
    for per_half in _by_run(block.schedule, halves):
        last = max(per_half, key=lambda span: span.end)
        runs[last.operator].append(last)
    for each in block.sums:
        for span in runs[each.operator]:
            yield span.start + each.part * (span.end - span.start), each.seconds


def _by_run(schedule: Schedule, halves: Sequence[Sequence[Span]]) -> Iterator[list[Span]]:
    """Yield the spans of each run of an operator: of all halves, and of all chunks."""
    counts: dict[str, list[list[Span]]] = defaultdict(list)
    for spans in halves:
        seen: dict[str, int] = defaultdict(int)
        for span in spans:
            run = 0 if span.operator in PER_CHUNK else seen[span.operator]
            seen[span.operator] += 1
            if run == len(counts[span.operator]):
                counts[span.operator].append([])
            counts[span.operator][run].append(span)
    for runs in counts.values():
        yield from runs


def joined(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the times that are in any of the intervals, in order."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        elif end > begin:
            union.append((begin, end))
    return union


def sums_end(backward: Pass) -> float:
    """Return when the last sum has ended. Sums run in the order in which they are ready, in the
    time in which the link carries no rows."""
    now = 0.0
    rows = iter([*backward.rows, (float("inf"), float("inf"))])
    begin, end = next(rows)
    for ready, seconds in sorted(backward.ready):
        now = max(now, ready)
        left = seconds
        while left > 0:
            while end <= now:
                begin, end = next(rows)
            if begin <= now:
                now = end
                continue
            carried = min(left, begin - now)
            left -= carried
            now += carried
    return now
