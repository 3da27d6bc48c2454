"""Draws Fig. 9, gating over training, Fig. 10, similarity of representations, and the norm of
their gradients by depth (Eq. 22).

representations.py measures what they show.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmoe.charts import PAPER, SMALL, chart, heading
from scmoe.training.callbacks.representations import GATING_TITLES

# a panel with at most this many representations shows its entries as numbers
NUMBERED_REPRESENTATIONS = 12
PAPERS_MOST = 0.98  # the only number that the paper prints for Fig. 9: (a) in SwinV2-MoE-S


def draw_gating(
    steps: Sequence[int], labels: Sequence[str], values: Any, path: Path, words: str = ""
) -> None:
    """Draw four panels over training steps, with a line for each MoE layer.

    values: [steps, layers, 4].
    """
    from matplotlib import colormaps

    _, distance, *scores = values.max((0, 1)).tolist()
    tops = (1.1, distance or 1.0, max(scores), max(scores))  # (c) and (d) share a scale
    shades = colormaps["viridis"].resampled(max(2, len(labels)) + 1)
    with chart(path, 5.6 + 0.2 * (len(labels) // 4)) as figure:
        for i, (axis, name) in enumerate(
            zip(figure.subplots(2, 2, sharex=True).flat, GATING_TITLES, strict=True)
        ):
            for layer, label in enumerate(labels):
                axis.plot(
                    steps,
                    values[:, layer, i],
                    color=shades(layer),
                    marker=".",
                    linewidth=1.5,
                    label=label,
                )
            handles, names = axis.get_legend_handles_labels()
            axis.set(title=GATING_TITLES[name], ylim=(0, 1.08 * tops[i]))
            axis.grid(axis="y")
            if name == "repeated_selection":
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
                axis.axhline(PAPERS_MOST, color=PAPER, linestyle="--", linewidth=1)
                axis.text(
                    steps[0],
                    PAPERS_MOST + 0.02,
                    "paper: up to 98 %",
                    va="bottom",
                    color=PAPER,
                    fontsize=SMALL,
                )
            if i >= 2:
                axis.set_xlabel("optimizer step")
        heading(figure, words)
        figure.legend(
            handles, names, loc="outside lower left", ncols=min(4, len(labels)), columnspacing=1.0
        )


def draw_similarity(
    steps: Sequence[int], labels: Sequence[str], values: Any, path: Path, words: str = ""
) -> None:
    """Draw the last matrix, with a panel for each width. values: [steps, N, N].

    The colour scale starts at the lowest value: neighbours are near 1, and would look the same on a
    scale from 0.
    """
    starts = [i for i, label in enumerate(labels) if label == "input"] + [len(labels)]
    groups = [slice(a, b) for a, b in pairwise(starts)]
    matrix = values[-1]
    sides = [min(4.4, max(1.6, 0.42 * (group.stop - group.start))) for group in groups]  # inches
    lowest = math.floor(20 * min(0.95, float(torch.as_tensor(matrix).nan_to_num(1.0).min()))) / 20
    with chart(path, 0.4 + sum(sides) + len(sides)) as figure:
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=sides)[:, 0]
        for axis, group, side in zip(axes, groups, sides, strict=True):
            size = group.stop - group.start
            image = axis.imshow(matrix[group, group], vmin=lowest, vmax=1, cmap="magma")
            ticks = range(0, size, math.ceil(0.14 * size / side))  # a name is 0.14 inches high
            names = [labels[group][i] for i in ticks]
            axis.set_xticks(ticks, names, rotation=90, fontsize=SMALL)
            axis.set_yticks(ticks, names, fontsize=SMALL)
            axis.spines[:].set_visible(False)
            if size <= NUMBERED_REPRESENTATIONS:
                for (i, j), value in np.ndenumerate(matrix[group, group]):
                    color = "w" if value < (1 + lowest) / 2 else "k"
                    text = f"{value:.2f}".replace("0.", ".")
                    axis.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=color)
        step = f"cosine similarity after {steps[-1]:,} steps"
        heading(figure, f"{words}\n{step}" if words else step)
        figure.colorbar(image, ax=list(axes), shrink=min(1.0, 3.0 / sum(sides)), anchor=(0.0, 1.0))


def draw_gradients(
    steps: Sequence[int], labels: Sequence[str], values: Any, path: Path, words: str = ""
) -> None:
    """Draw the gradient's norm at each representation over that at the last one, with a line for
    the first and one for the last measured step. values: [steps, N, 1]."""
    norms = values[:, :, 0]
    with chart(path, 3.6) as figure:
        axis = figure.subplots()
        for index in dict.fromkeys((0, len(steps) - 1)):
            axis.plot(norms[index] / norms[index, -1], marker=".", label=f"step {steps[index]:,}")
        depth_axis(axis, labels)
        heading(figure, words or "gradient of the loss by depth (Eq. 22)")
        figure.legend(loc="outside lower left", ncols=2)


def depth_axis(axis: Any, labels: Sequence[str]) -> None:
    """Name the representations below an axis, and set the scale of norms over the last one's."""
    ticks = range(0, len(labels), math.ceil(len(labels) / 13))
    axis.set_xticks(ticks, [labels[i] for i in ticks], rotation=90, fontsize=SMALL)
    axis.set_yscale("log")
    axis.set_ylabel("norm, over that at the last")
    axis.grid(axis="y")
