"""The figures of the README and docs.

The timelines are the cost model's, not measurements: operator times stand in the title.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

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
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 20), ylim=(0, 6.4))
    axis.axis("off")
    backbone, stream = 4.6, 1.5
    for i, label in enumerate(("Attention", "MLP", "Attention", "Shared\nexpert")):
        x = 2.5 + 4 * i
        _box(axis, x, backbone, label)
        _arrow(axis, (max(0.3, x - 3), backbone), (x - 1, backbone))
    _arrow(axis, (15.5, backbone), (17.55, backbone))
    for i, label in enumerate(("Gate,\nencode", "All-to-All\ndispatch", "Experts", "All-to-All\ncombine", "Decode")):
        x = 6.0 + 2.6 * i
        _box(axis, x, stream, label)
        _arrow(axis, (x - 1.6 if i else 4.3, stream), (x - 1, stream))
    axis.plot([4.3, 4.3], [backbone, stream], color="black", linewidth=1.3)
    axis.text(4.15, 3.1, "shortcut\n(tap, Pos-2)", ha="right", va="center", fontsize=9)
    axis.plot([17.4, 18.0], [stream, stream], color="black", linewidth=1.3)
    _arrow(axis, (18.0, stream), (18.0, backbone - 0.45))
    axis.text(18.0, backbone, "+", fontsize=16, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"})
    _arrow(axis, (18.45, backbone), (19.7, backbone))
    axis.text(0.3, 5.9, "Block-MLP (layer l)", fontsize=10, fontweight="bold")
    axis.text(9.0, 5.9, "Block-MoE (layer l+1)", fontsize=10, fontweight="bold")
    axis.plot([8.6, 8.6], [3.4, 6.2], color="#999999", linestyle="--", linewidth=1)
    note = "MoE stream: its transfers run in parallel with MLP, attention, shared expert"
    axis.text(5.05, 0.3, note, fontsize=9, style="italic")
    axis.text(15.0, 0.3, "(residual connections, norms: not drawn)", fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _box(axis: Axes, x: float, y: float, label: str) -> None:
    color = COLORS.get(label.lower().replace("all-to-all\n", "").replace("\n", "_"), "#8a817c")
    axis.add_patch(FancyBboxPatch((x - 0.95, y - 0.5), 1.9, 1.0, boxstyle="round,pad=0.06", color=color))
    axis.text(x, y, label, ha="center", va="center", color="white", fontsize=9)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.3})
