"""What a schedule costs: its operators are played on the computation and the links of the ranks
(Fig. 7), which gives the elapsed time of the window and the exposed communication; Eq. 11, and the
best schedule.

Computation operators run one after another on each rank. A transfer begins when every rank has
launched it, and runs in parallel with computation until an operator waits for it. A rank's link
carries one transfer after another, each in both directions at once. So a transfer takes as long as
the busier direction of a rank, and it ends on all ranks when that of the busiest rank has ended:
every rank exchanges rows with it.

    `play`          ranks have even rows, so one of them stands for all
    `play_ranks`    each rank has rows of its own

Two transfers never share a link, even where one only fills the direction that the other leaves
free, as dispatch to a busy rank and combine from it do. NCCL runs the transfers of a communicator
one after another. With gloo a rank sends only after the receiver has announced that it is ready,
and this message waits behind the rows that the receiver is sending itself
(docs/decisions/0019-point-to-point.md).

Eq. 11 chooses the slot by |T_pre - T_disp| + |T_post - T_comb|, a mismatch. The elapsed time of a
pair is all its computation plus the parts of the transfers that the backbone does not cover, so
this module chooses by elapsed time (docs/decisions/0007-schedule-slots.md). With one chunk the
uncovered parts are

    max(0, T_disp - T_pre) + max(0, T_comb - T_post)

T_pre, T_post: backbone time before and after the experts. With more chunks, and for backward, the
timeline is played.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from scmoe.schedule.schedule import Schedule

TRANSFERS = ("dispatch", "combine")
PER_CHUNK = ("dispatch", "experts", "combine")
# what a rank computes for each transfer right before it begins; only timelines that are played
# (play_ranks, stack.play_order) read it
LAUNCH = "launch"


@dataclass(frozen=True)
class Span:
    """An operator's time on its row, from start to end, in the unit of the given times."""

    operator: str
    start: float
    end: float

    @property
    def is_transfer(self) -> bool:
        return self.operator in TRANSFERS


class Share(NamedTuple):
    """A rank's rows of one chunk, each over those of an even chunk."""

    sent: float  # to the experts of other ranks; on the way back these are received
    received: float  # for its own experts; on the way back these are sent
    computed: float  # by its own experts


EVEN = Share(1.0, 1.0, 1.0)


class BusyLink(Protocol):
    """A link whose transfers of rows take longer where they meet sums of gradients
    (predict/shared_link.py), or shorter after an idle time (predict/token_bucket.py)."""

    def computed(self, span: Span, layer: int = 0, half: int = 0) -> None:
        """Note that an operator of the slowest rank has run."""

    def meets(self, begin: float, duration: float) -> float:
        """Return by how much a transfer of rows takes longer than its duration; negative:
        shorter."""


def shares(rows_RR: Sequence[Sequence[float]]) -> list[Share]:
    """Return the share of each rank, of two or more.

    rows_RR: rows of a chunk, by sending and receiving rank.
    """
    ranks = len(rows_RR)
    computed = [sum(column) for column in zip(*rows_RR, strict=True)]
    even = sum(computed) / ranks
    through_link = even * (1 - 1 / ranks)
    return [
        Share(
            (sum(row) - row[r]) / through_link,
            (computed[r] - row[r]) / through_link,
            computed[r] / even,
        )
        for r, row in enumerate(rows_RR)
    ]


def play(
    operators: Sequence[str], times: Mapping[str, float], sequential: bool = False
) -> list[Span]:
    """Return when each operator runs, in the order of `operators`, if all ranks have even rows."""
    even = [[EVEN]] * max(1, operators.count("dispatch"), operators.count("combine"))
    return play_ranks(operators, times, even, sequential)[0]


def play_ranks(
    operators: Sequence[str],
    times: Mapping[str, float],
    shares_PR: Sequence[Sequence[Share]],
    sequential: bool = False,
    starts: Sequence[float] | None = None,
    link: BusyLink | None = None,
) -> list[list[Span]]:
    """Return when each operator runs on each rank, in the order of `operators`.

    operators: Schedule.operators() or .backward_operators(); others may stand before and after. The
    i-th experts wait for the i-th transfer of the first kind (backward: combine's gradients),
    decode waits for all (backward: encode). times: the time of each operator, of an even chunk
    where there are several; one that is missing takes none. LAUNCH is computed before each
    transfer, which begins after it. shares_PR: the share of each rank in each chunk. starts: when
    each rank begins, with free links; None: at 0. sequential: each transfer is waited for right
    after its start, as moe.dispatcher.Blocking does. link: None: every transfer takes its duration.
    """
    ranks = range(len(shares_PR[0]))
    clock = list(starts) if starts else [0.0 for _ in ranks]
    free_R = [0.0 for _ in ranks]  # when each link is free
    spans: list[list[Span]] = [[] for _ in ranks]
    ends: dict[str, list[float]] = {operator: [] for operator in TRANSFERS}
    computed = 0  # chunks
    first = next((operator for operator in operators if operator in TRANSFERS), "dispatch")
    last = {"dispatch": "decode", "combine": "encode"}[first]

    for operator in operators:
        duration = times.get(operator, 0.0)
        if operator in TRANSFERS:
            if LAUNCH in times:
                for r in ranks:
                    spans[r].append(Span(LAUNCH, clock[r], clock[r] + times[LAUNCH]))
                    clock[r] = spans[r][-1].end
            chunk = shares_PR[len(ends[operator])]
            rows_R = [max(share.sent, share.received) for share in chunk]
            begins, end = carry(max(clock), duration, rows_R, free_R)
            if link is not None:
                later = link.meets(max(begins), duration * max(rows_R))
                free_R = [max(b, free + later) for b, free in zip(begins, free_R, strict=True)]
                end = max(*begins, end + later)
            ends[operator].append(end)
            for r in ranks:
                spans[r].append(Span(operator, begins[r], end))
            if sequential:
                clock = [end for _ in ranks]
            continue

        factors = [1.0 for _ in ranks]
        if operator == "experts":
            clock = [max(time, ends[first][computed]) for time in clock]
            factors = [share.computed for share in shares_PR[computed]]
            computed += 1
        elif operator == last:
            clock = [max([time, *ends["dispatch"], *ends["combine"]]) for time in clock]
        for r in ranks:
            spans[r].append(Span(operator, clock[r], clock[r] + duration * factors[r]))
            clock[r] = spans[r][-1].end
        if link is not None:
            link.computed(max((each[-1] for each in spans), key=lambda span: span.end))
    return spans


def carry(
    launched: float, duration: float, rows_R: Sequence[float], free_R: list[float]
) -> tuple[list[float], float]:
    """Return when a transfer begins on each rank's link, and when it ends on all.

    launched: when the last rank launches it. rows_R: rows of the busier direction of each link,
    over those that take `duration`. free_R: when each link is free; it is updated.
    """
    begins, end = [], launched
    for rank, rows in enumerate(rows_R):
        begins.append(max(launched, free_R[rank]) if rows > 0 else launched)
        if rows > 0:
            free_R[rank] = begins[rank] + rows * duration
            end = max(end, free_R[rank])
    return begins, end


def elapsed(spans: Sequence[Span]) -> float:
    """Return the time at which the last span ends."""
    return max(span.end for span in spans)


@dataclass(frozen=True)
class OperatorTimes:
    """Time of each operator, summed over chunks. Inference has no backward times."""

    forward: Mapping[str, float]
    backward: Mapping[str, float] = field(default_factory=dict)


def elapsed_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return the time from the tap to the end of the block; with backward times, also back."""
    directions = (
        (schedule.operators(), times.forward),
        (schedule.backward_operators(), times.backward),
    )
    return sum(
        elapsed(play(operators, per_chunk(schedule, seconds))) for operators, seconds in directions
    )


def per_chunk(schedule: Schedule, times: Mapping[str, float]) -> dict[str, float]:
    """Return the time of each operator where it runs once: of one chunk."""
    return {op: t / schedule.chunks if op in PER_CHUNK else t for op, t in times.items()}


def computing_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return the time of all computation from the tap to the end of the block, and back."""
    before, after = schedule.around_experts
    operators = ("route", "encode", *before, *after, *schedule.after_window, "experts", "decode")
    return sum(
        direction.get(op, 0.0) for direction in (times.forward, times.backward) for op in operators
    )


def exposed_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Return the part of the elapsed time in which the processor waits for a transfer."""
    return elapsed_time(schedule, times) - computing_time(schedule, times)


def mismatch(schedule: Schedule, times: OperatorTimes) -> float:
    """Return Eq. 11's objective for the schedule's slot; it depends on forward times only."""
    before, after = schedule.around_experts
    pre = sum(times.forward.get(op, 0.0) for op in before)
    post = sum(times.forward.get(op, 0.0) for op in after + schedule.after_window)
    return abs(pre - times.forward["dispatch"]) + abs(post - times.forward["combine"])


def slots(schedule: Schedule) -> list[Schedule]:
    """Return the schedule at every slot of its window and inside each attention, in their order."""
    between = [(slot, False) for slot in range(len(schedule.window) + 1)]
    inside = [(slot, True) for slot in schedule.attentions]
    return [
        replace(schedule, expert_slot=slot, inside_attention=is_inside)
        for slot, is_inside in sorted(between + inside)
    ]


def best_schedule(choices: Iterable[Schedule], times: Mapping[int, OperatorTimes]) -> Schedule:
    """Return the choice with the least elapsed time; of equal ones the first.

    times: by number of chunks.
    """
    return min(choices, key=lambda choice: elapsed_time(choice, times[choice.chunks]))


def overlap_efficiency(overlapped: Any, sequential: Any, free: Any) -> Any:
    """Return 1 - (T_overlapped - T_free) / (T_sequential - T_free), FLUX's definition.

    It is 1 where all communication is hidden, 0 where none is, below 0 where hiding it costs more
    than it saves. free: the time without communication, so computation that a transfer slows down
    lowers the efficiency. The times are numbers, or arrays of them.
    """
    return 1 - (overlapped - free) / (sequential - free)
