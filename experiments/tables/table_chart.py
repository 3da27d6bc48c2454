"""A table's charts: differences to the baselines, and losses at equal time."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.tables.equivalence import interval_of_answer
from experiments.tables.table_page import Results, value_format, without_speed
from scmoe.charts import BLUE, GREEN, ORANGE, PAPER, SKY, SMALL, chart, heading

OUR_COLOR, SEED_COLOR = BLUE, SKY
SCALE_COLORS = (PAPER, ORANGE, OUR_COLOR, GREEN)
SHORT_NAME = 17  # letters that fit beside a chart on one line
BEYOND = 1.6  # the axis reaches this many times as far as any seed


def draw_table(results: Results, path: Path) -> None:
    """Draw the answers of a registered experiment, else the differences to the baselines."""
    draw = draw_answers if "decision" in results else draw_differences
    draw(results, path)


def draw_differences(results: Results, path: Path) -> None:
    """Draw the differences to the baselines: the paper's, where it prints them, and ours."""
    rows = [row for row in results["rows"] if row["minus_baseline"] is not None]
    papers = _from_the_top([row["paper"]["difference"] for row in rows])
    printed = any(paper is not None for paper in papers.values())
    signed = value_format(results["unit"]).replace(":", ":+")
    with chart(path, 2.4 + 0.5 * len(rows)) as figure:
        panels = figure.subplots(1, 1 + printed, sharey=True, squeeze=False)[0]
        if printed:
            _draw_paper(panels[0], papers, signed)
        panels[-1].set_title(f"Ours, {results['scale']}")
        _draw_ours(panels[-1], _from_the_top([row["minus_baseline"] for row in rows]), signed)
        baselines = {row["baseline"] for row in rows}
        one = len(baselines) == 1
        baseline = in_paper(*baselines) if one else "each row's baseline"
        below = f"{results['metric'].replace('_', ' ')} minus\n{baseline},\n{results['unit']}"
        _explain(figure, panels, [row["name"] for row in rows], below, 3)
        side = "left" if results["metrics"][results["metric"]]["better"] == "lower" else "right"
        note = f"{side} is better" + ("; the two scales differ" if printed else "")
        heading(figure, f"{results['title']}\n{note}")


def draw_answers(results: Results, path: Path) -> None:
    """Draw the difference of each pair of a registered experiment, with the interval of the test
    that has answered, and the margin."""
    decision = results["decision"]
    pairs = decision["rows"]
    signed = value_format(results["unit"]).replace(":", ":+")
    with chart(path, 2.4 + 0.8 * len(pairs)) as figure:  # a pair's name has up to four lines
        axis = figure.subplots()
        margin = decision["margin"]
        axis.axvspan(-margin, margin, color="#e8e8e8", label=f"margin of {margin:g}")
        for height, tested in _from_the_top(list(pairs.values())).items():
            if tested["n"]:
                low, high = interval_of_answer(tested)
                if low is not None:
                    label = "interval of the answer"
                    axis.hlines(height, low, high, color=OUR_COLOR, linewidth=2, label=label)
                axis.plot(tested["difference"], height, "D", color=OUR_COLOR, label="mean")
                text = f"{signed.format(tested['difference'])}: {tested['answer']}"
                _label(axis, text, tested["difference"], height)
        axis.margins(x=0.3)  # room for the words of a difference near an edge
        names = [pair.replace(" minus ", "\nminus ") for pair in pairs]
        below = f"difference in {results['metric'].replace('_', ' ')},\n{results['unit']}"
        _explain(figure, [axis], names, below, 3)
        side = "left" if results["metrics"][results["metric"]]["better"] == "lower" else "right"
        heading(figure, f"{results['title']}\n{side} is better for the first row of a pair")


def _from_the_top(values: Sequence[Any]) -> dict[int, Any]:
    """Return the values by their heights in a chart, of which the last one is 1."""
    return dict(zip(range(len(values), 0, -1), values, strict=True))


def _draw_paper(axis: Axes, papers: Mapping[int, float | None], signed: str) -> None:
    axis.set_title("Paper")
    for height, paper in papers.items():
        if paper is not None:
            axis.hlines(height, 0, paper, color=PAPER, linewidth=1.5)
            axis.plot(paper, height, "D", color=PAPER, markersize=7)
            _label(axis, signed.format(paper), paper, height)
    axis.margins(x=0.2)


def _draw_ours(axis: Axes, differences: Mapping[int, Results], signed: str) -> None:
    """Draw a dot for each seed, their mean and its interval; an arrow where that goes on beyond the
    axis."""
    for height, minus in differences.items():
        if minus["mean"] is not None:
            seeds = list(minus["by_seed"].values())
            _draw_mean(axis, minus, height, OUR_COLOR, "mean", "interval of the mean")
            axis.plot(
                seeds, [height] * len(seeds), "o", color=SEED_COLOR, markersize=4, label="one seed"
            )
            _label(axis, signed.format(minus["mean"]), minus["mean"], height)
    edge = BEYOND * max(
        (abs(x) for minus in differences.values() for x in minus["by_seed"].values()), default=0.0
    )
    if edge:
        axis.set_xlim(-edge, edge)
    for height, minus in differences.items():
        for end, x, marker in ((minus["low"], -edge, "<"), (minus["high"], edge, ">")):
            if end is not None and abs(end) > edge:
                axis.plot(x, height, marker, color=OUR_COLOR, markersize=7, clip_on=False)


def _draw_mean(
    axis: Axes, minus: Results, height: float, color: str, mean: str, interval: str = ""
) -> None:
    """Draw a difference and its interval, with these labels."""
    if minus["low"] is not None:
        axis.hlines(height, minus["low"], minus["high"], color=color, linewidth=2, label=interval)
    axis.plot(minus["mean"], height, "D", color=color, markersize=7, label=mean)


def draw_equal_time(results: Results, path: Path) -> None:
    """Draw each row's difference to its baseline in validation loss: at equal tokens, and at equal
    time by share."""
    columns = results["equal_time"]
    of_rows = columns["equal_tokens"]["rows"]
    names = [name for name, row in of_rows.items() if row["minus_baseline"] is not None]
    with chart(path, 2.0 + 0.7 * len(names)) as figure:
        axis = figure.subplots()
        for i, (share, column) in enumerate(columns.items()):
            label = (
                "equal tokens"
                if share == "equal_tokens"
                else f"equal time, share of communication {share}"
            )
            shift = 0.22 * ((len(columns) - 1) / 2 - i)
            for height, name in _from_the_top(names).items():
                minus = column["rows"][name]["minus_baseline"]
                if minus["mean"] is not None:
                    _draw_mean(axis, minus, height + shift, SCALE_COLORS[i], label)
        below = (
            "validation loss minus the\nbaseline's at the same time:\nmean and interval; left is"
            " better"
        )
        _explain(figure, [axis], names, below, 1)
        left_out = [
            f"without a measured speed: {in_paper(name)}" for name in without_speed(results)
        ]
        heading(
            figure,
            "\n".join([f"Quality at equal time, {results['scale']}", results["title"], *left_out]),
        )


def _explain(
    figure: Any, panels: Sequence[Axes], names: list[str], below: str, columns: int
) -> None:
    """Name the rows at the left, what is drawn below each panel, and the marks in a legend of so
    many columns."""
    words = [in_paper(name) for name in names]
    words = [
        name if len(name) <= SHORT_NAME else name.replace(", ", ",\n").replace(") (", ")\n(")
        for name in words
    ]
    panels[0].set_yticks(range(len(names), 0, -1), words)
    panels[0].set_ylim(0.3, len(names) + 0.9)
    for axis in panels:
        axis.set_xlabel(below)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(
            lambda x, _: f"{round(x, 9) + 0:g}".replace("-", "\N{MINUS SIGN}")
        )
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles, labels = panels[-1].get_legend_handles_labels()
    if marks := dict(zip(labels, handles, strict=True)):
        figure.legend(marks.values(), marks.keys(), loc="outside lower left", ncols=columns)


def in_paper(name: str) -> str:
    """Return a row's name as the paper writes it."""
    name = re.sub(r"(?<=\w )(Pos-\d)(?! in)", r"(\1)", name, count=1)
    return re.sub(r"^top-", "Standard top-", name).replace("shared-expert", "Shared-expert")


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    """Write a number above its mark."""
    axis.annotate(
        text,
        (x, y),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL,
        color="#444444",
        # the line at 0 may cross a number
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
