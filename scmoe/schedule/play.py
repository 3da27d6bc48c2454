"""Plays a list of operators on the computation and the links of the ranks (Fig. 7).

Computation operators run one after another on each rank. A transfer begins when every rank has launched it, and runs in
parallel with computation until an operator waits for it. A rank's link has two directions, and each carries its
transfers one after another. A transfer ends, on all ranks, when the busiest direction has carried its rows: every rank
exchanges rows with the busiest one.

    even rows      a transfer fills both directions, so transfers take turns: `play`, for all ranks at once
    uneven rows    the busy rank receives in dispatch and sends in combine, so a chunk's combine runs beside the next
                   chunk's dispatch: `play_ranks`

Directions are independent with gloo. NCCL runs all transfers of a communicator one after another: there chunks gain
less under uneven rows than `play_ranks` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TRANSFERS = ("dispatch", "combine")


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
    """A rank's rows of one chunk, each over those of an even chunk: what its link sends to the experts of other ranks
    and receives for its own (on the way back the reverse), and what its experts compute."""

    sent: float
    received: float
    computed: float


EVEN = Share(1.0, 1.0, 1.0)


def shares(rows_RR: Sequence[Sequence[float]]) -> list[Share]:
    """Returns the share of each rank, of two or more. rows_RR: rows of a chunk that each rank has for those of each."""
    ranks = len(rows_RR)
    computed = [sum(column) for column in zip(*rows_RR, strict=True)]
    even = sum(computed) / ranks
    through_link = even * (1 - 1 / ranks)
    return [
        Share((sum(row) - row[r]) / through_link, (computed[r] - row[r]) / through_link, computed[r] / even)
        for r, row in enumerate(rows_RR)
    ]


def play(operators: Sequence[str], times: Mapping[str, float], sequential: bool = False) -> list[Span]:
    """Returns when each operator runs, in the order of `operators`, where all ranks have even rows."""
    even = [[EVEN]] * max(1, operators.count("dispatch"), operators.count("combine"))
    return play_ranks(operators, times, even, sequential)[0]


def play_ranks(
    operators: Sequence[str],
    times: Mapping[str, float],
    shares_PR: Sequence[Sequence[Share]],
    sequential: bool = False,
    starts: Sequence[float] | None = None,
) -> list[list[Span]]:
    """Returns when each operator runs on each rank, in the order of `operators`.

    operators: Schedule.operators() or .backward_operators(); others may stand before and after. The i-th experts wait
    for the i-th transfer of the first kind (backward: combine's gradients), decode waits for all (backward: encode).
    times: the time of each operator, of an even chunk where there are several; one that is missing takes none.
    shares_PR: of each chunk, those of each rank. starts: when each rank begins, None: at 0, with links that are free.
    sequential: every transfer is waited for at once, as moe.dispatcher.Blocking does.
    """
    ranks = range(len(shares_PR[0]))
    clock = list(starts) if starts else [0.0 for _ in ranks]
    free_R2 = [[0.0, 0.0] for _ in ranks]  # when the directions of each link are: outward, inward
    spans: list[list[Span]] = [[] for _ in ranks]
    ends: dict[str, list[float]] = {operator: [] for operator in TRANSFERS}
    computed = 0  # chunks
    first = next((operator for operator in operators if operator in TRANSFERS), "dispatch")
    last = {"dispatch": "decode", "combine": "encode"}[first]
    for operator in operators:
        duration = times.get(operator, 0.0)
        if operator in TRANSFERS:
            chunk = shares_PR[len(ends[operator])]
            rows_R2 = [(s.sent, s.received) if operator == first else (s.received, s.sent) for s in chunk]
            begins, end = carry(max(clock), duration, rows_R2, free_R2)
            ends[operator].append(end)
            for r in ranks:
                spans[r].append(Span(operator, begins[r], end))
            clock = [end for _ in ranks] if sequential else clock
            continue
        factors = [1.0 for _ in ranks]
        if operator == "experts":
            clock = [max(at, ends[first][computed]) for at in clock]
            factors = [share.computed for share in shares_PR[computed]]
            computed += 1
        elif operator == last:
            clock = [max([at, *ends["dispatch"], *ends["combine"]]) for at in clock]
        for r in ranks:
            spans[r].append(Span(operator, clock[r], clock[r] + duration * factors[r]))
            clock[r] = spans[r][-1].end
    return spans


def carry(
    launched: float, duration: float, rows_R2: Sequence[tuple[float, float]], free_R2: list[list[float]]
) -> tuple[list[float], float]:
    """Returns when a transfer begins on each rank's link, and when it ends on all. Updates `free_R2`.

    launched: by the last rank. rows_R2: through both directions of each link, over those that take `duration`."""
    begins, end = [], launched
    for rows, free in zip(rows_R2, free_R2, strict=True):
        used = [direction for direction in (0, 1) if rows[direction] > 0]
        begins.append(max(launched, min((free[direction] for direction in used), default=launched)))
        for direction in used:
            free[direction] = max(launched, free[direction]) + rows[direction] * duration
            end = max(end, free[direction])
    return begins, end


def elapsed(spans: Sequence[Span]) -> float:
    """The time at which the last span ends."""
    return max(span.end for span in spans)
