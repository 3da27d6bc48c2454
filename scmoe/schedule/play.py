"""Plays a list of operators on one compute and one communication row (Fig. 7).

Computation operators run one after another, and so do transfers. A transfer runs in parallel with computation until an
operator waits for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def play(operators: Sequence[str], times: Mapping[str, float], sequential: bool = False) -> list[Span]:
    """Returns when each operator runs, in the order of `operators`.

    operators: Schedule.operators() or .backward_operators(); others may stand before and after. The i-th experts wait
    for the i-th transfer of the first kind (backward: combine's gradients), decode waits for all (backward: encode).
    times: the time of each operator, of one chunk where there are several; an operator that is missing takes none.
    sequential: every transfer is waited for at once, as moe.dispatcher.Blocking does.
    """
    spans: list[Span] = []
    compute = network = 0.0
    arrivals: list[float] = []
    first = next((operator for operator in operators if operator in TRANSFERS), "dispatch")
    last = {"dispatch": "decode", "combine": "encode"}[first]
    for operator in operators:
        duration = times.get(operator, 0.0)
        if operator in TRANSFERS:
            start = max(compute, network)
            network = start + duration
            spans.append(Span(operator, start, network))
            if operator == first:
                arrivals.append(network)
            if sequential:
                compute = network
            continue
        if operator == "experts":
            compute = max(compute, arrivals.pop(0))
        elif operator == last:
            compute = max(compute, network)
        spans.append(Span(operator, compute, compute + duration))
        compute += duration
    return spans


def elapsed(spans: Sequence[Span]) -> float:
    """The time at which the last span ends."""
    return max(span.end for span in spans)
