"""Plays a list of operators on one compute and one communication row, and draws it like Fig. 7.

Computation operators run one after another, and so do transfers. A transfer runs in parallel with computation until an
operator waits for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmoe.probes.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, SMALL, chart, heading

TRANSFERS = ("dispatch", "combine")
COLORS = {"attention": BLUE, "mlp": SKY, "shared_expert": GREEN, "experts": ORANGE, "dispatch": RED, "combine": PURPLE}
OTHER = "#bab0ac"
DARK = (BLUE, GREEN, RED)  # letters on these are white


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


def draw(timelines: Mapping[str, Sequence[Span]], path: Path, words: str, unit: str = "time") -> None:
    """Draws a pair of rows (computation above, communication below) for each timeline, on one axis. words: a title."""
    end = max(elapsed(spans) for spans in timelines.values())
    with chart(path, 1.7 + 1.15 * len(timelines)) as figure:
        axis = figure.subplots()
        for i, (name, spans) in enumerate(timelines.items()):
            for span in spans:
                row, length = -(3 * i + (1 if span.is_transfer else 0)), span.end - span.start
                color = COLORS.get(span.operator, OTHER)
                axis.barh(row, length, left=span.start, height=0.9, color=color, edgecolor="white")
                label = span.operator.replace("_", "\n")
                if length > 0.0155 * end * (1 + max(map(len, label.split("\n")))):  # room for the letters
                    place = (span.start + span.end) / 2, row
                    style: Any = {
                        "color": "white" if color in DARK else "black",
                        "fontsize": SMALL,
                        "linespacing": 0.85,
                    }
                    axis.text(*place, label, ha="center", va="center", **style)
            axis.vlines(elapsed(spans), -3 * i - 1.5, -3 * i + 0.5, color="black", linewidth=1)
            axis.text(elapsed(spans), -3 * i - 0.5, f" {elapsed(spans):.1f}", va="center", fontsize=9)
            axis.text(0, -3 * i + 0.6, name, fontweight="bold", va="bottom")
        ticks = [-3 * i - row for i in range(len(timelines)) for row in (0, 1)]
        axis.set_yticks(ticks, ["compute", "All-to-All"] * len(timelines))
        axis.set(ylim=(-3 * len(timelines) + 1.3, 1.6), xlim=(0, end * 1.1), xlabel=unit)
        heading(figure, words)
        colors = COLORS | {"route, encode, decode": OTHER}
        handles = [axis.barh(0, 0, color=color, label=name.replace("_", " ")) for name, color in colors.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=3)
