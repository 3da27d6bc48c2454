"""The one player of timelines (Fig. 7): what every rank does in order, in how long, gives when.

A rank computes one operator after another, and its link carries one transfer after another, each in
both directions at once. `order_of` writes down what a rank does, for any number of blocks and
batches in flight; `mirror` makes backward of it; `play` says when each part runs.

    computation   A M A 1 | A M A 2 | E 1 | E 2 | A M A 1      | A M A 2      | E 1 ...
    transfers             | D 1     | D 2 | C 1 | C 2          | D 1          | ...

A batch runs until it must wait for a transfer. Then it passes its turn to the next one in flight
(models/halves.py, moe/turns.py), whether or not the rows have arrived, so the order does not depend
on times. Autograd runs the nodes in the reverse order, so backward's order is the mirror of
forward's: a wait becomes a launch, and a launch a wait.

A transfer begins when every rank has launched it, and takes as long as the busier direction of a
rank. It ends on all ranks when that of the busiest one has ended: every rank exchanges rows with
it. Two transfers never share a link, even where one only fills the direction that the other leaves
free. NCCL runs the transfers of a communicator one after another. With gloo a rank sends only after
the receiver has announced that it is ready, and this message waits behind the rows that the
receiver is sending itself (docs/decisions/0019-point-to-point.md).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

from scmoe.schedule.schedule import Schedule

TRANSFERS = ("dispatch", "combine")
PER_CHUNK = ("dispatch", "experts", "combine")
BEFORE = "before"  # an operator: all that a block computes before its tap
# what a rank computes for each transfer right before it begins; only timelines read it
LAUNCH = "launch"


class Action(NamedTuple):
    """A part of a rank's work. half: the batch in flight. layer: of the blocks with an MoE. chunk:
    of experts and transfers."""

    kind: Literal["compute", "launch", "wait"]
    half: int
    layer: int
    operator: str
    chunk: int = 0

    def mirrored(self) -> "Action":
        kinds: dict[str, Literal["compute", "launch", "wait"]] = {
            "compute": "compute",
            "launch": "wait",
            "wait": "launch",
        }
        return self._replace(kind=kinds[self.kind])

    @property
    def transfer(self) -> tuple[int, int, str, int]:
        return self.half, self.layer, self.operator, self.chunk


class Span(NamedTuple):
    """When an action runs, from start to end, in the unit of the given times."""

    operator: str
    start: float
    end: float
    layer: int = 0
    half: int = 0

    @property
    def is_transfer(self) -> bool:
        return self.operator in TRANSFERS


class Share(NamedTuple):
    """A rank's rows of one chunk, each over those of an even chunk."""

    sent: float  # to the experts of other ranks; on the way back these are received
    received: float  # for its own experts; on the way back these are sent
    computed: float  # by its own experts

    @property
    def busier(self) -> float:
        """The larger of sent and received: the link's busier direction."""
        return max(self.sent, self.received)


EVEN = Share(1.0, 1.0, 1.0)
Load = Sequence[Sequence[Share]]  # of each chunk and rank of a block


class OtherTraffic(Protocol):
    """What else the links carry. A transfer of rows takes longer where it meets sums of gradients,
    or shorter after an idle time. The implementation is in a later room, predict/shared_link.py."""

    def computed(self, span: Span) -> None:
        """Note that an operator of the slowest rank has run."""

    def meets(self, begin: float, duration: float) -> float:
        """Return by how much a transfer of rows takes longer than its duration; negative:
        shorter."""


# ---------------------------------------------------------------------- the order of a rank


def order_of(
    schedules: Sequence[Schedule], batches: int = 1, sequential: bool = False
) -> Sequence[Action]:
    """Return what a rank does in forward, in order, with so many batches in flight.

    schedules: of the blocks, in order. sequential: each transfer is waited for right after its
    launch, as moe.dispatcher.Blocking does."""
    return _order(tuple(schedules), batches, sequential)


@lru_cache(maxsize=256)
def _order(schedules: tuple[Schedule, ...], batches: int, sequential: bool) -> tuple[Action, ...]:
    batches_of_actions = [
        [
            action
            for layer, schedule in enumerate(schedules)
            for action in actions_of(half, layer, schedule, sequential)
        ]
        for half in range(batches)
    ]
    return tuple(in_turns(batches_of_actions))


def in_turns(batches: Sequence[Sequence[Action]]) -> list[Action]:
    """Return the order of batches in flight, the first of which begins. Each passes its turn before
    a wait."""
    left = [deque(batch) for batch in batches]
    order = []
    while any(left):
        for actions in left:
            if actions:
                order.append(actions.popleft())
            while actions and actions[0].kind != "wait":
                order.append(actions.popleft())
    return order


def beside_backward(schedules: Sequence[Schedule]) -> list[Action]:
    """Return the order of a batch's forward beside the backward of the batch before it, as
    Megatron-Core and DualPipe run them. The layers of backward are numbered behind those of
    forward: their times and loads are those of backward."""
    forward = order_of(schedules)
    backward = [
        action._replace(half=1, layer=len(schedules) + action.layer) for action in mirror(forward)
    ]
    return in_turns([backward, forward])


def actions_of(half: int, layer: int, schedule: Schedule, sequential: bool = False) -> list[Action]:
    """Return what a batch does in a block, in order. It passes its turn before each wait."""
    actions = [Action("compute", half, layer, BEFORE)]
    launched = dict.fromkeys(TRANSFERS, 0)
    computed = 0
    for operator in schedule.operators():
        if operator in TRANSFERS:
            chunk = launched[operator]
            launched[operator] += 1
            actions.append(Action("launch", half, layer, operator, chunk))
            if sequential:
                actions.append(Action("wait", half, layer, operator, chunk))
            continue
        chunk = 0
        if operator == "experts":
            chunk = computed
            computed += 1
            if not sequential:
                actions.append(Action("wait", half, layer, "dispatch", chunk))
        elif operator == "decode" and not sequential:
            actions += [Action("wait", half, layer, "combine", i) for i in range(schedule.chunks)]
        actions.append(Action("compute", half, layer, operator, chunk))
    return actions


def mirror(order: Sequence[Action]) -> list[Action]:
    """Return backward's order. Its first transfers are those of combine's gradients."""
    return [action.mirrored() for action in reversed(order)]


# ---------------------------------------------------------------------- playing


def play(
    order: Sequence[Action],
    times: Sequence[Mapping[str, float]],
    loads: Sequence[Load] | None = None,
    traffic: OtherTraffic | None = None,
) -> list[list[Span]]:
    """Return when each operator and transfer of an order runs, on each rank.

    times: for each block, the duration of one run of each operator, with even rows; an operator
    without an entry takes no time. LAUNCH is computed before each transfer begins. loads: of each
    block; None: all ranks have even rows, so one rank stands for all. traffic: what else the links
    carry; None: nothing, and every transfer takes its duration.
    """
    ranks = 1 if loads is None else len(loads[0][0])
    clock = [0.0] * ranks
    free_R = [0.0] * ranks  # when each link is free
    spans_R: list[list[Span]] = [[] for _ in range(ranks)]
    arrives: dict[tuple[int, int, str, int], float] = {}

    def add(rank: int, operator: str, start: float, end: float, action: Action) -> None:
        spans_R[rank].append(Span(operator, start, end, action.layer, action.half))

    for action in order:
        of_block = times[action.layer]
        duration = of_block.get(action.operator, 0.0)
        shares: Sequence[Share] = (EVEN,)
        if loads is not None and action.operator in PER_CHUNK:
            shares = loads[action.layer][action.chunk]
        if action.kind == "wait":
            arrived = arrives[action.transfer]
            clock = [max(time, arrived) for time in clock]
        elif action.kind == "launch":
            if LAUNCH in of_block:
                for rank in range(ranks):
                    launched = clock[rank] + of_block[LAUNCH]
                    add(rank, LAUNCH, clock[rank], launched, action)
                    clock[rank] = launched
            rows_R = [share.busier for share in shares]
            begins, end = carry(max(clock), duration, rows_R, free_R)
            if traffic is not None:
                later = traffic.meets(max(begins), duration * max(rows_R))
                free_R = [max(b, free + later) for b, free in zip(begins, free_R, strict=True)]
                end = max(*begins, end + later)
            arrives[action.transfer] = end
            for rank, begin in enumerate(begins):
                add(rank, action.operator, begin, end, action)
        else:
            for rank in range(ranks):
                factor = shares[rank].computed if action.operator == "experts" else 1.0
                end = clock[rank] + duration * factor
                add(rank, action.operator, clock[rank], end, action)
                clock[rank] = end
            if traffic is not None:
                traffic.computed(max((each[-1] for each in spans_R), key=lambda span: span.end))
    return spans_R


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
    return max((span.end for span in spans), default=0.0)


# ---------------------------------------------------------------------- loads


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


def slowest_ranks(loads: Sequence[Load]) -> list[Load]:
    """Return the loads of those ranks that may be the slowest. A rank that has at most as many rows
    as another one, of each kind, in each block and chunk, is never later."""
    chunks = [chunk for load in loads for chunk in load]
    ranks = list(dict.fromkeys(zip(*chunks, strict=True)))
    numbers = [[number for share in rank for number in share] for rank in ranks]
    kept = [
        rank
        for rank, mine in zip(ranks, numbers, strict=True)
        if not any(
            other is not mine and all(a <= b for a, b in zip(mine, other, strict=True))
            for other in numbers
        )
    ]
    by_chunk = iter([list(chunk) for chunk in zip(*kept, strict=True)])
    return [[next(by_chunk) for _ in load] for load in loads]
