"""Results by row, ours beside the paper's: a row has its name above its marks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from scmoe.runs.html_report.svg import C1, C2, C3, INK, MUTED, drawing

COLORS = {"c1": C1, "c2": C2, "c3": C3, "ink": INK, "muted": MUTED}
LANE = 0.15  # inches of a mark; a name takes NAME lanes
NAME = 1.7


@dataclass(frozen=True)
class Mark:
    """A value of a row. low, high: its interval. color: a variable of the style sheet. shape: of
    matplotlib. text: what hovering over it shows."""

    value: float
    color: str
    text: str
    low: float | None = None
    high: float | None = None
    shape: str = "o"


def pair(interval: Any) -> tuple[float | None, float | None]:
    """Return the two ends of an interval; None for both where it is no pair of numbers."""
    if isinstance(interval, list) and len(interval) == 2:
        low, high = interval
        if isinstance(low, int | float) and isinstance(high, int | float):
            return low, high
    return None, None


def draw_rows(
    rows: Mapping[str, Sequence[Mark]], x: str, words: str, reference: float | None = None
) -> Markup:
    """Draw the marks of each row on one axis, whose label is `x`. reference: a line across."""
    lanes = max(len(marks) for marks in rows.values())
    pitch = NAME + lanes
    with drawing(words, 0.6 + LANE * pitch * len(rows)) as drawn:
        axis = drawn.figure.subplots()
        if reference is not None:
            axis.axvline(reference, color=INK, linewidth=0.9, linestyle=":")
        for number, (name, marks) in enumerate(rows.items()):
            top = pitch * number
            axis.text(0.0, top, name, transform=axis.get_yaxis_transform(), va="center")
            for lane, mark in enumerate(marks, 1):
                color = COLORS[mark.color]
                if mark.low is not None and mark.high is not None:
                    axis.hlines(top + lane + 0.15, mark.low, mark.high, color=color, linewidth=1.6)
                (dot,) = axis.plot(
                    mark.value,
                    top + lane + 0.15,
                    mark.shape,
                    color=color,
                    markersize=5.5,
                    clip_on=False,
                )
                dot.set_gid(drawn.tip(f"{name}: {mark.text}"))
        axis.set(ylim=(pitch * len(rows) - 0.2, -0.8), yticks=[], xlabel=x)
        axis.spines["left"].set_visible(False)
        axis.margins(x=0.06)
        axis.grid(axis="x")
    return drawn.svg
