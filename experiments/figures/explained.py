"""The figures of the README and docs.

The timelines are the cost model's, not measurements: operator times stand in the title.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from scmoe.probes.charts import PAPER, SMALL, chart
from scmoe.schedule.cost import OperatorTimes, best_schedule, slots
from scmoe.schedule.play import COLORS, DARK, draw, play
from scmoe.schedule.schedule import Schedule

# Units of one MLP: attention 3 (as in the testbed's emulated compute), and transfers such that a top-2 pair spends
# about half its time in them (testbed: share 0.52).
TIMES = {
    "attention": 3.0,
    **dict.fromkeys(("mlp", "shared_expert", "experts"), 1.0),
    **dict.fromkeys(("dispatch", "combine"), 2.45),
    **dict.fromkeys(("route", "encode", "decode"), 0.1),
}


def timelines(path: Path) -> None:
    """Draw a standard top-2 pair that waits for its transfers, and ScMoE at Pos-2 with the best slot (Fig. 7)."""
    top2 = {**TIMES, **{op: 2 * TIMES[op] for op in ("experts", "dispatch", "combine")}}
    standard = ("attention", "mlp", "attention", *Schedule("top_k").operators())
    schedule = best_schedule(slots(Schedule("scmoe", "pos2")), {1: OperatorTimes(TIMES)})
    shortcut = ("attention", *schedule.operators())
    pairs = {"Standard top-2, sequential": play(standard, top2, sequential=True)}
    pairs[f"ScMoE (Pos-2), experts at slot {schedule.slot}"] = play(shortcut, TIMES)
    title = "One pair, forward, by the cost model (attention 3, MLP 1, All-to-All of one expert per token 2.45)"
    draw(pairs, path, title, "time, in units of one MLP")


def pair(path: Path) -> None:
    """Draw Block-MLP and Block-MoE with the shortcut at Pos-2 (Fig. 4)."""
    with chart(path, 2.8) as figure:
        axis = figure.subplots()
        axis.set(xlim=(0, 20.8), ylim=(-0.5, 6.6))
        axis.axis("off")
        backbone, stream = 4.4, 1.5
        for i, label in enumerate(("Attention", "MLP", "Attention", "Shared\nexpert")):
            x = 2.5 + 4 * i
            _box(axis, x, backbone, label)
            _arrow(axis, (max(0.0, x - 2.75), backbone), (x - 1.25, backbone))
        _arrow(axis, (15.75, backbone), (18.2, backbone))
        for i, label in enumerate(("Gate,\nencode", "Dispatch", "Experts", "Combine", "Decode")):
            x = 5.8 + 2.9 * i
            _box(axis, x, stream, label)
            _arrow(axis, (x - 1.65 if i else 4.1, stream), (x - 1.25, stream))
        axis.plot([4.1, 4.1], [backbone, stream], color="black", linewidth=1.3)
        axis.text(3.9, 2.9, "shortcut\n(tap, Pos-2)", ha="right", va="center", fontsize=SMALL)
        axis.plot([18.6, 18.9], [stream, stream], color="black", linewidth=1.3)
        _arrow(axis, (18.9, stream), (18.9, backbone - 0.6))
        axis.text(
            18.9, backbone, "+", fontsize=14, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"}
        )
        _arrow(axis, (19.5, backbone), (20.8, backbone))
        axis.text(0.3, 5.9, "Block-MLP (layer l)", fontweight="bold")
        axis.text(9.0, 5.9, "Block-MoE (layer l+1)", fontweight="bold")
        axis.plot([8.5, 8.5], [3.2, 6.4], color="#999999", linestyle="--", linewidth=1)
        note = "MoE stream: its All-to-All (dispatch, combine) runs in\nparallel with the backbone"
        axis.text(0.3, -0.4, note, fontsize=SMALL, style="italic")


def _box(axis: Axes, x: float, y: float, label: str) -> None:
    color = COLORS.get(label.lower().replace("\n", "_"), PAPER)
    axis.add_patch(FancyBboxPatch((x - 1.12, y - 0.6), 2.24, 1.2, boxstyle="round,pad=0.06", color=color))
    letters = "white" if color in (*DARK, PAPER) else "black"
    axis.text(x, y, label, ha="center", va="center", color=letters, fontsize=SMALL)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.3})
