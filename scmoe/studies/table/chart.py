"""A table's charts: its differences to the baseline beside the paper's, and its losses at equal time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PAPER, OURS, SEED = "#8a817c", "#1b6ca8", "#9cc4e4"
COLORS = ("#8a817c", "#f28e2b", "#1b6ca8", "#59a14f")
SHORT_NAME = 17  # letters that fit beside a chart on one line
WIDTH = 7.2  # inches: at a phone's width the smallest letters are still read


def draw_differences(found: Mapping[str, Any], path: Path) -> None:
    """Draw the differences to the baselines, the paper's and ours: a dot for each seed, their mean and its interval."""
    rows = [row for row in found["rows"] if row["minus_baseline"] is not None]
    figure = Figure(figsize=(WIDTH, 2.2 + 0.5 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows), 0, -1)
    for row, place in zip(rows, places, strict=True):
        paper, minus = row["paper"]["difference"], row["minus_baseline"]
        if paper is not None:
            left.hlines(place, 0, paper, color=PAPER, linewidth=1.5)
            left.plot(paper, place, "D", color=PAPER, markersize=7)
            _label(left, f"{paper:+.3g}", paper, place)
        if minus["mean"] is not None:
            seeds = list(minus["by_seed"].values())
            right.plot(seeds, [place] * len(seeds), "o", color=SEED, markersize=6, label="one seed")
            if minus["low"] is not None:
                right.hlines(place, minus["low"], minus["high"], color=OURS, linewidth=2, label="interval of the mean")
            right.plot(minus["mean"], place, "D", color=OURS, markersize=7, label="mean")
            _label(right, f"{minus['mean']:+.3g}", minus["mean"], place)
    left.margins(x=0.2)
    _name_rows(left, [row["name"] for row in rows])
    several = len({row["baseline"] for row in rows}) > 1
    baseline = "each row's baseline" if several else rows[0]["baseline"]
    for axis, title in ((left, "Paper"), (right, f"Ours, {found['scale']}")):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(f"{found['metric'].replace('_', ' ')} minus\n{baseline}, {found['unit']}", fontsize=10)
        _plain(axis)
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=3, frameon=False, fontsize=10)
    side = "left" if found["metrics"][found["metric"]]["better"] == "lower" else "right"
    figure.suptitle(f"{found['title']}\n{side} is better; the two scales differ", fontsize=11)
    figure.savefig(path, dpi=150)


def draw_equal_time(found: Mapping[str, Any], path: Path) -> None:
    """Draw each row's difference to its baseline in validation loss: at equal tokens, and at equal time by share."""
    columns = found["equal_time"]
    of_rows = columns["equal_tokens"]["rows"]
    names = [name for name, own in of_rows.items() if own["minus_baseline"] is not None]
    figure = Figure(figsize=(WIDTH, 2.0 + 0.7 * len(names)), layout="constrained")
    axis = figure.subplots()
    for i, (share, column) in enumerate(columns.items()):
        label = "equal tokens" if share == "equal_tokens" else f"equal time, share of communication {share}"
        shift = 0.22 * ((len(columns) - 1) / 2 - i)
        for place, name in zip(range(len(names), 0, -1), names, strict=True):
            minus = column["rows"][name]["minus_baseline"]
            if minus["mean"] is None:
                continue
            if minus["low"] is not None:
                axis.hlines(place + shift, minus["low"], minus["high"], color=COLORS[i], linewidth=2)
            axis.plot(minus["mean"], place + shift, "D", color=COLORS[i], markersize=7, label=label)
    _name_rows(axis, names)
    axis.set_xlabel(
        "validation loss minus the baseline's at the same time\nmean and interval; left is better", fontsize=10
    )
    _plain(axis)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, fontsize=10)
    figure.suptitle(f"Quality at equal time, {found['scale']}\n{found['title']}", fontsize=11)
    figure.savefig(path, dpi=150)


def _name_rows(axis: Axes, names: list[str]) -> None:
    words = [name if len(name) < SHORT_NAME else name.replace(", ", ",\n") for name in names]
    axis.set_yticks(range(len(names), 0, -1), words, fontsize=10)
    axis.set_ylim(0.3, len(names) + 0.9)


def _plain(axis: Axes) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=10)


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line at 0 may cross a figure
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": "#444444"}
    axis.annotate(text, (x, y), (0, 7), bbox=behind, **place)
