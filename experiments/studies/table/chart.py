"""A table's charts: its differences to the baseline beside the paper's, and its losses at equal time."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from scmoe.probes.charts import BLUE, GREEN, ORANGE, PAPER, SKY, SMALL, chart, heading

OURS, SEED = BLUE, SKY
COLORS = (PAPER, ORANGE, OURS, GREEN)
SHORT_NAME = 17  # letters that fit beside a chart on one line
BEYOND = 1.6  # the scale reaches this many times as far as any seed; arrows show an interval that goes on


def draw_differences(found: Mapping[str, Any], path: Path) -> None:
    """Draw the differences to the baselines: the paper's, where it prints them, and ours.

    Ours have a dot for each seed, their mean and its interval.
    """
    rows = [row for row in found["rows"] if row["minus_baseline"] is not None]
    places = range(len(rows), 0, -1)
    papers = [row["paper"]["difference"] for row in rows]
    printed = any(paper is not None for paper in papers)
    signed = form_of(found["unit"]).replace(":", ":+")
    with chart(path, 2.4 + 0.5 * len(rows)) as figure:
        panels = figure.subplots(1, 1 + printed, sharey=True, squeeze=False)[0]
        if printed:
            panels[0].set_title("Paper")
            for paper, place in zip(papers, places, strict=True):
                if paper is not None:
                    panels[0].hlines(place, 0, paper, color=PAPER, linewidth=1.5)
                    panels[0].plot(paper, place, "D", color=PAPER, markersize=7)
                    _label(panels[0], signed.format(paper), paper, place)
            panels[0].margins(x=0.2)
        ours = panels[-1]
        ours.set_title(f"Ours, {found['scale']}")
        for row, place in zip(rows, places, strict=True):
            _draw_ours(ours, row["minus_baseline"], place, signed)
        farthest = max((abs(x) for row in rows for x in row["minus_baseline"]["by_seed"].values()), default=0.0)
        if farthest:
            edge = BEYOND * farthest
            ours.set_xlim(-edge, edge)
            for row, place in zip(rows, places, strict=True):
                _mark_cut(ours, row["minus_baseline"], place, edge)
        _name_rows(panels[0], [row["name"] for row in rows])
        several = len({row["baseline"] for row in rows}) > 1
        baseline = "each row's baseline" if several else in_paper(rows[0]["baseline"])
        for axis in panels:
            axis.set_xlabel(f"{found['metric'].replace('_', ' ')} minus\n{baseline},\n{found['unit']}")
            _plain(axis)
        _legend(figure, ours, ncols=3)
        side = "left" if found["metrics"][found["metric"]]["better"] == "lower" else "right"
        note = f"{side} is better" + ("; the two scales differ" if printed else "")
        heading(figure, f"{found['title']}\n{note}")


def _draw_ours(axis: Axes, minus: Mapping[str, Any], place: float, signed: str) -> None:
    if minus["mean"] is None:
        return
    seeds = list(minus["by_seed"].values())
    if minus["low"] is not None:
        axis.hlines(place, minus["low"], minus["high"], color=OURS, linewidth=2, label="interval of the mean")
    axis.plot(minus["mean"], place, "D", color=OURS, markersize=7, label="mean")
    axis.plot(seeds, [place] * len(seeds), "o", color=SEED, markersize=4, label="one seed")
    _label(axis, signed.format(minus["mean"]), minus["mean"], place)


def _mark_cut(axis: Axes, minus: Mapping[str, Any], place: float, edge: float) -> None:
    """Draw an arrow at each end of an interval that lies beyond the edges of the scale."""
    for end, x, marker in ((minus["low"], -edge, "<"), (minus["high"], edge, ">")):
        if end is not None and abs(end) > edge:
            axis.plot(x, place, marker, color=OURS, markersize=7, clip_on=False)


def draw_equal_time(found: Mapping[str, Any], path: Path) -> None:
    """Draw each row's difference to its baseline in validation loss: at equal tokens, and at equal time by share."""
    columns = found["equal_time"]
    of_rows = columns["equal_tokens"]["rows"]
    names = [name for name, own in of_rows.items() if own["minus_baseline"] is not None]
    with chart(path, 2.0 + 0.7 * len(names)) as figure:
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
        axis.set_xlabel("validation loss minus the baseline's at the same time\nmean and interval; left is better")
        _plain(axis)
        _legend(figure, axis, ncols=1)
        left_out = [f"without a measured speed: {in_paper(name)}" for name in without_speed(found)]
        heading(figure, "\n".join([f"Quality at equal time, {found['scale']}", found["title"], *left_out]))


def without_speed(found: Mapping[str, Any]) -> list[str]:
    """Return the rows of a table that its results at equal time leave out."""
    there = found["equal_time"]["equal_tokens"]["rows"]
    return [row["name"] for row in found["rows"] if row["name"] not in there]


def form_of(unit: str) -> str:
    """Return the format of a metric's values: a loss in nats with four decimals, others with two, as in the paper."""
    return "{:.4f}" if unit.startswith("nats") else "{:.2f}"


def _legend(figure: Any, axis: Axes, ncols: int) -> None:
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=ncols)


def _name_rows(axis: Axes, names: list[str]) -> None:
    words = [in_paper(name) for name in names]
    words = [name if len(name) <= SHORT_NAME else name.replace(", ", ",\n").replace(") (", ")\n(") for name in words]
    axis.set_yticks(range(len(names), 0, -1), words)
    axis.set_ylim(0.3, len(names) + 0.9)


def in_paper(name: str) -> str:
    """Return a row's name as the paper writes it."""
    name = re.sub(r"\b(Pos-\d)(?! in)", r"(\1)", name, count=1)
    return re.sub(r"^top-", "Standard top-", name).replace("shared-expert", "Shared-expert")


def _plain(axis: Axes) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(lambda x, _: f"{round(x, 9) + 0:g}".replace("-", "\N{MINUS SIGN}"))
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line at 0 may cross a figure
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": SMALL, "color": "#444444"}
    axis.annotate(text, (x, y), (0, 7), bbox=behind, **place)
