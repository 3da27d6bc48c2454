"""Compares runs: their results, how their configs differ, and their curves over the tokens
(images) they saw, or over the seconds of their training."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import EngFormatter
from rich import box
from rich.table import Column, Table
from rich.text import Text

from scmoe.charts import chart
from scmoe.runs.seen import SeenRun, differences

PANELS = {"train/loss": "Training (single batches)", "val/loss": "Validation"}
CURVE_STYLES = ("-", "--", ":")  # for more runs than colours, and for runs whose curves are equal
MARKERS = ("o", "x", "+")  # of validations, likewise
LEGEND_LETTERS = 60  # of a line of the legend
Points = list[tuple[float, float]]


def run_letters(runs: Sequence[SeenRun]) -> list[str]:
    """Return the letter by which each run is named in tables and legends."""
    return [chr(ord("a") + i) if i < 26 else str(i + 1) for i in range(len(runs))]


def results_table(runs: Sequence[SeenRun], letters: Sequence[str]) -> Table:
    names = ("steps", "best val loss", "last val loss", "tokens (images)/s")
    numbers = [Column(name, justify="right") for name in names]
    table = Table("", "run", "state", *numbers, box=box.SIMPLE_HEAD, pad_edge=False)
    for letter, run in zip(letters, runs, strict=True):
        curve, speed = run.curve("val/loss"), run.per_s
        best = "" if run.best_loss is None else f"{run.best_loss:.4f}"  # all may be NaN
        losses = [best, f"{curve[-1][1]:.4f}" if curve else ""]
        steps = f"{run.steps}/{run.max_steps}"
        table.add_row(
            letter, Text(str(run.path)), run.state, steps, *losses, f"{speed:,.0f}" if speed else ""
        )
    return table


def differences_table(runs: Sequence[SeenRun], letters: Sequence[str]) -> Table | str:
    """Return a line for each key that is not equal in all runs."""
    different = differences(runs)
    if not different:
        return "the configs are the same"
    table = Table("differs in", *letters, box=box.SIMPLE_HEAD, pad_edge=False)
    for key, values in different.items():
        table.add_row(key, *map(Text, values))
    return table


def gains_of_schedules(runs: Sequence[SeenRun], letters: Sequence[str]) -> list[str]:
    """Return a line for each run that differs from one with sequential transfers in its schedule
    alone."""
    named = list(zip(letters, runs, strict=True))
    lines = []
    for letter, baseline in named:
        if baseline.config["schedule.transfers"] != "sequential" or not baseline.per_s:
            continue
        for other, run in named:
            keys = differences([baseline, run])
            if run.per_s and keys and all(key.startswith("schedule.") for key in keys):
                ratio = run.per_s / baseline.per_s
                gain = f"{ratio:.2f} x the {run.counts}/s of {letter}"
                lines.append(f"{other} has {gain}, whose transfers are sequential")
    return lines


def run_labels(runs: Sequence[SeenRun], letters: Sequence[str]) -> list[str]:
    """Return for each run its letter, its name, and the values in which the runs differ."""
    different = differences(runs)
    labels = []
    for i, (letter, run) in enumerate(zip(letters, runs, strict=True)):
        words = [
            f"{key.rpartition('.')[2]} {values[i]}"
            for key, values in different.items()
            if not key.endswith("_every")
        ]
        labels.append(
            f"{letter}: {run.config['name']}" + (f" ({', '.join(words[:6])})" if words else "")
        )
    return labels


def curve_over_seconds(run: SeenRun, metric: str) -> Points:
    """Return points (seconds of training, value); none for a run that has logged no speed.

    Seconds are sums of tokens over logged speeds: without validation and checkpoints, and right
    across the parts of a resumed run. After the last logged speed they go on at its speed.
    """
    logged = run.curve(f"time/{run.counts}_per_s")
    speeds = [(tokens, per_s) for tokens, per_s in logged if per_s > 0]
    points = run.curve(metric)
    if not speeds or not points:
        return []
    amounts, per_s = np.array(speeds).T
    seconds = np.cumsum(np.diff(amounts, prepend=0) / per_s)
    tokens, values = np.array(points).T
    beyond = np.maximum(tokens - amounts[-1], 0) / per_s[-1]
    elapsed = np.interp(tokens, [0, *amounts], [0, *seconds]) + beyond
    return [*zip(elapsed.tolist(), values.tolist(), strict=True)]


def draw(
    runs: Sequence[SeenRun], labels: Sequence[str], path: Path, over_seconds: bool = False
) -> None:
    """Draw the training loss above and the validation loss below, one colour a run.

    labels: of the runs, each begins with its letter and a colon.
    """
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    curve = curve_over_seconds if over_seconds else SeenRun.curve
    with chart(path, 6.2 + 0.2 * len(runs)) as figure:
        axes = figure.subplots(2, 1, sharex=True, sharey=True)
        curves: list[list[Points]] = []
        for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
            points_by_panel = [curve(run, metric) for metric in PANELS]
            twins = curves.count(points_by_panel)
            curves.append(points_by_panel)
            line = {
                "color": colors[i % 10],
                "linestyle": CURVE_STYLES[(i // 10 + twins) % len(CURVE_STYLES)],
                "linewidth": 1.4,
            }
            marker = {"marker": MARKERS[twins % len(MARKERS)], "markersize": 4 + 2 * twins}
            if twins:
                letter = labels[curves.index(points_by_panel)].partition(":")[0]
                label += f"; same curves as {letter}"
            shown = fill(label, LEGEND_LETTERS, break_on_hyphens=False)
            line["label"] = shown.replace("$", r"\$")  # a dollar sign in a name is one
            for axis, metric, points in zip(axes, PANELS, points_by_panel, strict=True):
                dots = marker if metric == "val/loss" or len(points) == 1 else {}
                axis.plot(*(zip(*points, strict=True) if points else ((), ())), **line, **dots)
        for axis, name in zip(axes, PANELS.values(), strict=True):
            axis.set(title=name, ylabel="loss, nats", xlim=(0, None))
            axis.grid()
        amounts = " or ".join(sorted({run.counts for run in runs}))
        axes[1].set_xlabel("seconds of training" if over_seconds else amounts)
        axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=1)
