"""Runs side by side: their results, how their configs differ, and their curves over the tokens (images) they saw."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich import box
from rich.table import Column, Table
from rich.text import Text

from scmoe.studies.runs import SeenRun, differences

PANELS = {"train/loss": "Training (single batches)", "val/loss": "Validation"}
STYLES = ("-", "--", ":")  # for more runs than colours


def results_table(runs: Sequence[SeenRun], letters: Sequence[str]) -> Table:
    names = ("steps", "best val loss", "last val loss", "tokens (images)/s")
    numbers = [Column(name, justify="right") for name in names]
    table = Table("", "run", "state", *numbers, box=box.SIMPLE_HEAD, pad_edge=False)
    for letter, run in zip(letters, runs, strict=True):
        curve, speed = run.curve("val/loss"), run.per_s
        losses = [f"{run.best_loss:.4f}", f"{curve[-1][1]:.4f}"] if curve else ["", ""]
        steps = f"{run.steps}/{run.config['trainer.max_steps']}"
        table.add_row(letter, Text(str(run.path)), run.state, steps, *losses, f"{speed:,.0f}" if speed else "")
    return table


def differences_table(runs: Sequence[SeenRun], letters: Sequence[str]) -> Table | str:
    """Return a line for each key that is not equal in all runs."""
    found = differences(runs)
    if not found:
        return "the configs are the same"
    table = Table("differs in", *letters, box=box.SIMPLE_HEAD, pad_edge=False)
    for key, values in found.items():
        table.add_row(key, *map(Text, values))
    return table


def labels_of(runs: Sequence[SeenRun], letters: Sequence[str]) -> list[str]:
    """Return for each run its letter, its name, and the values in which the runs differ."""
    found = differences(runs)
    labels = []
    for i, (letter, run) in enumerate(zip(letters, runs, strict=True)):
        words = [f"{key.rpartition('.')[2]} {values[i]}" for key, values in found.items() if not key.endswith("_every")]
        labels.append(f"{letter}: {run.config['name']}" + (f" ({', '.join(words[:6])})" if words else ""))
    return labels


def draw(runs: Sequence[SeenRun], letters: Sequence[str], path: Path) -> None:
    """Draw the training loss on the left and the validation loss on the right, one colour a run."""
    figure = Figure(figsize=(11, 4.6 + 0.22 * len(runs)), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (run, label) in enumerate(zip(runs, labels_of(runs, letters), strict=True)):
        style = {"color": colors[i % 10], "linestyle": STYLES[i // 10 % len(STYLES)], "label": label}
        for axis, metric in zip(axes, PANELS, strict=True):
            points = run.curve(metric)
            marker = "o" if metric == "val/loss" else None
            axis.plot(*zip(*points, strict=True) if points else ((), ()), linewidth=1.4, marker=marker, ms=4, **style)
    unit = " or ".join(sorted({run.counts for run in runs}))
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set_title(title, fontsize=11)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set(xlabel=unit, xlim=(0, None), axisbelow=True)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss, nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=1, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
