"""Draws played or measured operators like Fig. 7: a row of computation above a row of
communication."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from scmoe.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, SMALL, chart, heading
from scmoe.schedule.play import BEFORE, TRANSFERS, Span, elapsed
from scmoe.schedule.schedule import ATTENTION_PARTS

OPERATOR_COLORS = {
    "attention": BLUE,
    "mlp": SKY,
    "shared_expert": GREEN,
    "experts": ORANGE,
    "dispatch": RED,
    "combine": PURPLE,
}
OTHER = "#bab0ac"
DARK = (BLUE, GREEN, RED)  # letters on these are white


def with_sublayers(
    spans: Iterable[Span], times: Mapping[str, float], before: Sequence[str]
) -> Iterator[Span]:
    """Yield the spans, with the sub-layers of a pair before its tap in place of their sum."""
    for span in spans:
        if span.operator != BEFORE:
            yield span
            continue
        share = (span.end - span.start) / sum(times[operator] for operator in before)
        start = span.start
        for operator in before:
            end = start + share * times[operator]
            yield span._replace(operator=operator, start=start, end=end)
            start = end


def draw(
    timelines: Mapping[str, Sequence[Span]], path: Path, words: str, unit: str = "time"
) -> None:
    """Draw a pair of rows (computation above, communication below) for each timeline, on one axis.
    words: a title."""
    end = max(elapsed(spans) for spans in timelines.values())
    named = names_with_room(timelines, end)
    with chart(path, 1.7 + 1.15 * len(timelines)) as figure:
        axis = figure.subplots()
        for i, (name, spans) in enumerate(timelines.items()):
            for span in spans:
                row, length = -(3 * i + (1 if span.is_transfer else 0)), span.end - span.start
                whole = "attention" if span.operator in ATTENTION_PARTS else span.operator
                color = OPERATOR_COLORS.get(whole, OTHER)
                axis.barh(row, length, left=span.start, height=0.9, color=color, edgecolor="white")
                if span.operator in named:
                    x, ink = (span.start + span.end) / 2, "white" if color in DARK else "black"
                    axis.text(
                        x,
                        row,
                        label_of(span.operator),
                        ha="center",
                        va="center",
                        color=ink,
                        fontsize=SMALL,
                        linespacing=0.85,
                    )
            axis.vlines(elapsed(spans), -3 * i - 1.5, -3 * i + 0.5, color="black", linewidth=1)
            axis.text(
                elapsed(spans), -3 * i - 0.5, f" {elapsed(spans):.1f}", va="center", fontsize=9
            )
            axis.text(0, -3 * i + 0.6, name, fontweight="bold", va="bottom")
        ticks = [-3 * i - row for i in range(len(timelines)) for row in (0, 1)]
        axis.set_yticks(ticks, ["compute", "All-to-All"] * len(timelines))
        axis.set(ylim=(-3 * len(timelines) + 1.3, 1.6), xlim=(0, end * 1.1), xlabel=unit)
        heading(figure, words)
        colors = OPERATOR_COLORS | {"route, encode, decode": OTHER}
        handles = [
            axis.barh(0, 0, color=color, label=name.replace("_", " "))
            for name, color in colors.items()
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=3)


def names_with_room(timelines: Mapping[str, Sequence[Span]], end: float) -> set[str]:
    """Return the operators whose name fits into each of their bars; the legend has all names. Of
    dispatch and combine both are named or neither."""
    spans = [span for timeline in timelines.values() for span in timeline]
    without_room = {span.operator for span in spans if not has_room(span, end)}
    if without_room.intersection(TRANSFERS):
        without_room.update(TRANSFERS)
    return {span.operator for span in spans} - without_room


def has_room(span: Span, end: float) -> bool:
    letters = max(map(len, label_of(span.operator).split("\n")))
    return span.end - span.start > 0.0155 * end * (1 + letters)


def label_of(operator: str) -> str:
    return operator.replace("_", "\n")
