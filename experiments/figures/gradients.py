"""Appendix A.1 (Eq. 17 to 22): the norm of the loss's gradient by depth, for five architectures.

The paper derives that every sub-layer of a pair, shortcut included, adds to the residual stream,
x_{l+1} = x_l + F(x_l), so that dE/dx_l contains dE/dx_L itself, whatever the depth. It measures
nothing. Here each architecture is trained for a few steps with each seed, and the norm of dE/dx_l
is shown over that of dE/dx_L. It would fall or rise with depth by orders of magnitude if gradients
vanished or exploded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scmoe.charts import LINES, chart, heading
from scmoe.config.load import load_config
from scmoe.report import Report, publish, say
from scmoe.training.callbacks.representation_charts import depth_axis
from scmoe.training.run.from_python import train_from_python

CONFIG = "configs/experiment/gradients.yaml"
GRADIENT_ROWS = {
    "Standard top-2": ("moe.architecture=top_k", "moe.top_k=2"),
    "Shared expert": ("moe.architecture=shared_expert",),
    "ScMoE Pos-1": ("moe.position=pos1",),
    "ScMoE Pos-2": ("moe.position=pos2",),
    "ScMoE Pos-3": ("moe.position=pos3",),
}
SEEDS = (1, 2, 3)
BEHIND_FIRST_BLOCK = 2  # the number of representations before: the input, the first attention's


def measure_gradients(out: Path) -> dict[str, Any]:
    """Train every row with every seed, print a table, and write chart and figures into the folder
    `out`. Return the report."""
    rows: dict[str, list[Any]] = {row: [] for row in GRADIENT_ROWS}
    for seed in SEEDS:
        for row, words in GRADIENT_ROWS.items():
            say(f"{row}, seed {seed}")
            run = train_from_python(
                load_config(CONFIG, [*words, f"seed={seed}", f"runs_dir={out}/runs"])
            )
            assert run is not None
            with np.load(run / "analysis" / "gradients.npz", allow_pickle=False) as stored:
                norms = stored["values"][:, :, 0]
                steps, labels = stored["steps"].tolist(), stored["labels"].tolist()
            rows[row].append([[float(f"{norm:.4g}") for norm in of_step] for of_step in norms])
    report = {"seeds": SEEDS, "steps": steps, "labels": labels, "norms": rows}
    publish(report, tables(report), draw, out / "gradients")
    return report


def over_last(report: Mapping[str, Any], row: str) -> Any:
    """Return the norms of a row over those at the last representation: [seeds, steps, depth]."""
    norms = np.array(report["norms"][row])
    return norms / norms[:, :, -1:]


def tables(report: Mapping[str, Any]) -> list[Report]:
    rows = {}
    for row in report["norms"]:
        ratios = over_last(report, row)
        parts = {
            "first": ratios[:, 0],
            "input": ratios[:, -1, 0],
            "later": ratios[:, -1, BEHIND_FIRST_BLOCK:],
        }
        rows[row] = {name: [part.min(), part.max()] for name, part in parts.items()}
    first, last = report["steps"][0], report["steps"][-1]
    columns = {
        f"step {first}, at any depth": "{first[0]:.2f} to {first[1]:.2f}",
        f"step {last}, at the input": "{input[0]:.2f} to {input[1]:.2f}",
        f"step {last}, behind the first block": "{later[0]:.2f} to {later[1]:.2f}",
    }
    title = (
        "Norm of the loss's gradient over that at the last representation, least and most of"
        f" {len(report['seeds'])} seeds:"
    )
    return [Report(title, rows, columns)]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for the first and one for the last measured step, with the mean over seeds of
    each row and the range between them."""
    steps, labels = report["steps"], report["labels"]
    depth = np.arange(len(labels))
    with chart(path, 6.4) as figure:
        axes = figure.subplots(2, 1, sharex=True, sharey=True)
        for axis, index in zip(axes, (0, len(steps) - 1), strict=True):
            for row, color in zip(report["norms"], LINES, strict=False):
                ratios = over_last(report, row)[:, index]
                axis.plot(depth, ratios.mean(0), color=color, label=row)
                axis.fill_between(depth, ratios.min(0), ratios.max(0), color=color, alpha=0.2)
            axis.set_title(f"step {steps[index]}")
            depth_axis(axis, labels)
        heading(figure, "Eq. 22: norm of the loss's gradient by depth, 12 blocks")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
