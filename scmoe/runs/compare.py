"""Compares runs: their results, how their configs differ, and their curves over the tokens
(images) they saw."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import colormaps
from matplotlib.ticker import EngFormatter
from rich import box
from rich.table import Column, Table
from rich.text import Text

from scmoe.charts import chart
from scmoe.runs.seen import SeenRun, differences

PANELS = {"train/loss": "Training (single batches)", "val/loss": "Validation"}
STYLES = ("-", "--", ":")  # for more runs than colours, and for runs whose curves are equal
MARKERS = ("o", "x", "+")  # of validations, likewise
LETTERS = 60  # of a line of the legend


def results_table(runs: Sequence[SeenRun], letters: Sequence[str]) -> Table:
    names = ("steps", "best val loss", "last val loss", "tokens (images)/s")
    numbers = [Column(name, justify="right") for name in names]
    table = Table("", "run", "state", *numbers, box=box.SIMPLE_HEAD, pad_edge=False)
    for letter, run in zip(letters, runs, strict=True):
        curve, speed = run.curve("val/loss"), run.per_s
        losses = [f"{run.best_loss:.4f}", f"{curve[-1][1]:.4f}"] if curve else ["", ""]
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


def labels_of(runs: Sequence[SeenRun], letters: Sequence[str]) -> list[str]:
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


def draw(runs: Sequence[SeenRun], letters: Sequence[str], path: Path) -> None:
    """Draw the training loss above and the validation loss below, one colour a run."""
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    with chart(path, 6.2 + 0.2 * len(runs)) as figure:
        axes = figure.subplots(2, 1, sharex=True, sharey=True)
        curves: list[list[Any]] = []
        for i, (run, label) in enumerate(zip(runs, labels_of(runs, letters), strict=True)):
            points_by_panel = [run.curve(metric) for metric in PANELS]
            twins = curves.count(points_by_panel)
            curves.append(points_by_panel)
            line = {
                "color": colors[i % 10],
                "linestyle": STYLES[(i // 10 + twins) % len(STYLES)],
                "linewidth": 1.4,
            }
            marker = {"marker": MARKERS[twins % len(MARKERS)], "markersize": 4 + 2 * twins}
            if twins:
                label += f"; same curves as {letters[curves.index(points_by_panel)]}"
            line["label"] = fill(label, LETTERS, break_on_hyphens=False)
            for axis, metric, points in zip(axes, PANELS, points_by_panel, strict=True):
                dots = marker if metric == "val/loss" or len(points) == 1 else {}
                axis.plot(*(zip(*points, strict=True) if points else ((), ())), **line, **dots)
        for axis, name in zip(axes, PANELS.values(), strict=True):
            axis.set(title=name, ylabel="loss, nats", xlim=(0, None))
            axis.grid()
        axes[1].set_xlabel(" or ".join(sorted({run.counts for run in runs})))
        axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=1)
