"""The figures of the README and docs.

The timelines are the cost model's, not measurements: operator times stand in the title.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from scmoe.charts import SMALL, chart
from scmoe.schedule.cost import OperatorTimes, best_schedule, slots
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.timeline import COLORS, draw, play

# Units of one MLP: attention 3 (Table 1's rows imply 3 : 1), and transfers such that a top-2 pair spends about half
# its time in them (testbed: share 0.52).
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
    pairs[f"ScMoE, Pos-2, experts at slot {schedule.slot}"] = play(shortcut, TIMES)
    title = "One pair, forward, by the cost model (attention 3, MLP 1, All-to-All of one expert per token 2.45)"
    draw(pairs, path, title, "time, in units of one MLP")


def pair(path: Path) -> None:
    """Draw Block-MLP and Block-MoE with the shortcut at Pos-2 (Fig. 4)."""
    with chart(path, 2.6) as figure:
        axis = figure.subplots()
        axis.set(xlim=(0, 20), ylim=(0, 6.6))
        axis.axis("off")
        backbone, stream = 4.4, 1.5
        for i, label in enumerate(("Attention", "MLP", "Attention", "Shared\nexpert")):
            x = 2.5 + 4 * i
            _box(axis, x, backbone, label)
            _arrow(axis, (max(0.0, x - 2.9), backbone), (x - 1.15, backbone))
        _arrow(axis, (15.6, backbone), (17.5, backbone))
        for i, label in enumerate(("Gate,\nencode", "Dispatch", "Experts", "Combine", "Decode")):
            x = 6.0 + 2.7 * i
            _box(axis, x, stream, label)
            _arrow(axis, (x - 1.6 if i else 4.3, stream), (x - 1.15, stream))
        axis.plot([4.3, 4.3], [backbone, stream], color="black", linewidth=1.3)
        axis.text(4.1, 2.9, "shortcut\n(tap, Pos-2)", ha="right", va="center", fontsize=9)
        axis.plot([17.9, 18.3], [stream, stream], color="black", linewidth=1.3)
        _arrow(axis, (18.3, stream), (18.3, backbone - 0.6))
        axis.text(
            18.3, backbone, "+", fontsize=14, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"}
        )
        _arrow(axis, (18.9, backbone), (20.0, backbone))
        axis.text(0.3, 5.9, "Block-MLP (layer l)", fontweight="bold")
        axis.text(9.0, 5.9, "Block-MoE (layer l+1)", fontweight="bold")
        axis.plot([8.5, 8.5], [3.2, 6.4], color="#999999", linestyle="--", linewidth=1)
        note = "MoE stream: its All-to-All (dispatch, combine) runs in parallel with the backbone"
        axis.text(0.3, 0.1, note, fontsize=SMALL, style="italic")


def _box(axis: Axes, x: float, y: float, label: str) -> None:
    color = COLORS.get(label.lower().replace("\n", "_"), "#8a817c")
    axis.add_patch(FancyBboxPatch((x - 1.05, y - 0.6), 2.1, 1.2, boxstyle="round,pad=0.06", color=color))
    axis.text(x, y, label, ha="center", va="center", color="white", fontsize=SMALL)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.3})
