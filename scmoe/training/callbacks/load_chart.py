"""Draws the experts' load that a training has kept (training/callbacks/expert_load.py)."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scmoe.charts import BLUE, ORANGE, SMALL, chart, title
from scmoe.moe.balance import SINGLE_STEPS

# A heat map with more cells in a row or column shows no numbers: they would not be readable.
CELLS = 16


def worst_layers(table: Path) -> dict[int, list[float]]:
    """Return the worst layer's load of each logged step in an ExpertLoad's table.

    The load is that of the sums over steps, then the first four of SINGLE_STEPS.
    """
    worst: dict[int, list[float]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            counts_E = [int(count) for name, count in row.items() if name.startswith("expert_")]
            loads = [max(counts_E) * len(counts_E) / max(sum(counts_E), 1)]
            loads += [float(row[name]) for name in SINGLE_STEPS[:4]]
            step = int(row["step"])
            of_other_layers = worst.get(step, loads)
            worst[step] = [max(pair) for pair in zip(of_other_layers, loads, strict=True)]
    return worst


def draw_load(
    counts_LE: list[list[int]], path: Path, over_training: Mapping[int, Sequence[float]]
) -> None:
    """Draw the copies of each expert over the fair share of its layer, for every MoE layer.

    over_training: the worst layer's load, from `worst_layers`, which is drawn below.
    """
    num_layers, num_experts = len(counts_LE), len(counts_LE[0])
    share_LE = [
        [count * num_experts / max(sum(counts_E), 1) for count in counts_E]
        for counts_E in counts_LE
    ]
    heights = [min(1.6 + 0.35 * num_layers, 8.0)]  # inches
    if len(over_training) > 1:
        heights.append(2.4)
    with chart(path, sum(heights) + 0.6 * (len(heights) - 1)) as figure:
        axis, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        image = axis.imshow(
            share_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest"
        )
        if num_experts <= CELLS:
            for layer, row in enumerate(share_LE):
                for expert, share in enumerate(row):
                    axis.text(
                        expert, layer, f"{share:.1f}", ha="center", va="center", fontsize=SMALL
                    )
        axis.set(xlabel="expert", ylabel="MoE layer")
        axis.set_xticks(range(0, num_experts, -(-num_experts // CELLS)))
        axis.set_yticks(range(0, num_layers, -(-num_layers // CELLS)))
        title(axis, "Load: copies over the fair share, last logged steps")
        figure.colorbar(image, ax=axis, extend="max")
        for axis in below:
            draw_load_over_training(axis, over_training)


def draw_load_over_training(axis: Any, worst: Mapping[int, Sequence[float]]) -> None:
    """Draw the load of the busiest expert and of the busiest rank over training steps."""
    steps = list(worst)
    of_sums, *single = zip(*worst.values(), strict=True)
    for (median, highest), color, who in zip(
        (single[:2], single[2:]), (BLUE, ORANGE), ("expert", "rank"), strict=True
    ):
        if max(highest) > 1:  # a single expert-parallel rank has all experts
            label = f"busiest {who} of a step, median to worst"
            axis.fill_between(steps, median, highest, color=color, alpha=0.25, linewidth=0)
            axis.plot(steps, median, color=color, linewidth=1.5, label=label)
    axis.plot(
        steps,
        of_sums,
        color=BLUE,
        linestyle=":",
        linewidth=1.5,
        label="busiest expert of all steps together",
    )
    axis.set(xlabel="optimizer step", ylim=(1, None))
    axis.grid(axis="y")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left")
    title(axis, "Load over the fair share since the last log, worst layer")
