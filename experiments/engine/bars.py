"""Charts of grouped bars, with values that no bar, whisker or line covers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scmoe.charts import ORANGE, SMALL

BAR, GAP = 0.17, 0.14  # inches of a bar with its value, and between groups of bars


class Bar(NamedTuple):
    """text: its value, which stands beside the bars. quartiles: ends of a whisker. limit: a line
    across the bar."""

    value: float
    color: str
    text: str
    quartiles: Sequence[float] | None = None
    limit: float | None = None


def bars_height(groups: Mapping[str, Sequence[Bar]], lines: int = 0) -> float:
    """Return how many inches `grouped_bars` needs for its bars."""
    return sum(BAR * max(lines, len(bars)) + GAP for bars in groups.values())


def grouped_bars(
    axis: Any, groups: Mapping[str, Sequence[Bar]], room: float = 0.24, lines: int = 0
) -> None:
    """Draw groups of bars from top to bottom, with names at the left and values in a column at the
    right.

    The column begins where everything else has ended, so no value lies on a bar, on a whisker or on
    a line. room: width of the column over that of the axis. lines: a group has room for at least so
    many bars, so that the groups of two axes stand side by side.
    """
    from matplotlib.ticker import MaxNLocator

    ends = [
        x
        for bars in groups.values()
        for b in bars
        for x in (b.value, b.limit or 0, *(b.quartiles or ()))
    ]
    end, top = 1.02 * max(ends), 0.0
    names: dict[str, float] = {}
    for name, bars in groups.items():
        for i, bar in enumerate(bars):
            y = top + BAR * (i + 0.5)
            axis.barh(y, bar.value, 0.88 * BAR, color=bar.color)
            axis.text(1.02 * end, y, bar.text, va="center_baseline", fontsize=SMALL)
            if bar.quartiles is not None:
                axis.hlines(y, *bar.quartiles, color="black", linewidth=1.2)
            if bar.limit is not None:
                axis.vlines(bar.limit, y - 0.5 * BAR, y + 0.5 * BAR, color=ORANGE, linewidth=2.5)
        names[name] = top + BAR * max(lines, len(bars)) / 2
        top += BAR * max(lines, len(bars)) + GAP
    axis.set_yticks(list(names.values()), list(names))
    axis.tick_params(axis="y", length=0)
    axis.set(ylim=(top - GAP / 2, -GAP / 2), xlim=(0, end / (1 - room)))
    axis.spines.bottom.set_bounds(0, end)
    axis.set_xticks(
        [tick for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, end) if tick <= end]
    )
    axis.grid(axis="x")


def bar_legend(
    figure: Any, colors: Mapping[str, str], quartiles: str = "", limit: str = "", ncols: int = 2
) -> None:
    """Add a legend of the colours below a figure, and of its whiskers and limits in these words."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color, label=label) for label, color in colors.items()]
    if quartiles:
        handles.append(Line2D([], [], color="black", linewidth=1.2, label=quartiles))
    if limit:
        mark: Any = {"marker": "|", "markersize": 10, "markeredgewidth": 2.5, "linestyle": ""}
        handles.append(Line2D([], [], color=ORANGE, label=limit, **mark))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=ncols, columnspacing=1.2, handlelength=1.4
    )
