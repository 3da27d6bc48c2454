"""Drawings of the README and docs that show no measurement: pairs, windows, slots, chunks, ranks and timelines.

The timelines are the cost model's: the operator times below are assumed, and stand in the titles.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from scmoe.experiments.engine.gantt import COLORS, DARK, OTHER, draw
from scmoe.probes.charts import PAPER, SMALL, chart
from scmoe.schedule.cost import OperatorTimes, best_schedule, elapsed_time, per_chunk, play
from scmoe.schedule.cost import slots as all_slots
from scmoe.schedule.schedule import PARTS, POSITIONS, Schedule

# Units of one MLP: attention 3 (as in the testbed's emulated compute), and transfers such that a top-2 pair spends
# about half its time in them (testbed: share 0.52).
TIMES = {
    "attention": 3.0,
    **dict(zip(PARTS, (2.4, 0.6), strict=True)),
    **dict.fromkeys(("mlp", "shared_expert", "experts"), 1.0),
    **dict.fromkeys(("dispatch", "combine"), 2.45),
    **dict.fromkeys(("route", "encode", "decode"), 0.1),
}
TOP2_TIMES = {**TIMES, **{op: 2 * TIMES[op] for op in ("experts", "dispatch", "combine")}}  # twice the rows
UNIT = "time from the tap, in units of one MLP"


def timelines(path: Path) -> None:
    """Draw a standard top-2 pair that waits for its transfers, and ScMoE at Pos-2 with the best slot (Fig. 7)."""
    standard = ("attention", "mlp", "attention", *Schedule("top_k").operators())
    whole = [choice for choice in all_slots(Schedule("scmoe", "pos2")) if not choice.inside_attention]
    schedule = best_schedule(whole, {1: OperatorTimes(TIMES)})
    shortcut = ("attention", *schedule.operators())
    pairs = {"Standard top-2, sequential": play(standard, TOP2_TIMES, sequential=True)}
    pairs[f"ScMoE (Pos-2), experts at slot {schedule.slot}"] = play(shortcut, TIMES)
    title = "One pair, forward, by the cost model (attention 3, MLP 1, All-to-All of one expert per token 2.45)"
    draw(pairs, path, title, "time, in units of one MLP")


def pair(path: Path) -> None:
    """Draw Block-MLP and Block-MoE with the shortcut at Pos-2 (Fig. 4)."""
    with chart(path, 2.8) as figure:
        axis = _canvas(figure.subplots(), 20.8, 6.6, bottom=-0.5)
        backbone, stream = 4.4, 1.5
        for i, label in enumerate(("Attention", "MLP", "Attention", "Shared\nexpert")):
            x = 2.5 + 4 * i
            _box(axis, x - 1.08, backbone, 2.16, label)
            _arrow(axis, (max(0.0, x - 2.75), backbone), (x - 1.25, backbone))
        _arrow(axis, (15.75, backbone), (18.2, backbone))
        for i, label in enumerate(("Gate,\nencode", "Dispatch", "Experts", "Combine", "Decode")):
            x = 5.8 + 2.9 * i
            _box(axis, x - 1.08, stream, 2.16, label)
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


def windows(path: Path) -> None:
    """Draw the sub-layers of a pair, and below them the tap and the window of each position (section 3.1)."""
    with chart(path, 2.5) as figure:
        axis = _canvas(figure.subplots(), 20, 8.3)
        lefts = (3.0, 7.2, 11.4, 15.6)
        for left, label in zip(lefts, ("Attention", "MLP", "Attention", "Shared\nexpert"), strict=True):
            _arrow(axis, (left - 1.4, 6.6), (left, 6.6))
            _box(axis, left, 6.6, 2.8, label)
        _arrow(axis, (18.4, 6.6), (19.9, 6.6))
        axis.text(3.0, 8.0, "Block-MLP", fontweight="bold", fontsize=9, va="center")
        axis.text(11.4, 8.0, "Block-MoE", fontweight="bold", fontsize=9, va="center")
        for i, (position, sublayers) in enumerate(POSITIONS.items()):
            tap, y = lefts[len(lefts) - 1 - sublayers] - 0.7, 4.3 - 1.7 * i
            axis.plot([tap, tap], [6.6, y], color="black", linewidth=1, linestyle=":")
            axis.plot([tap], [6.6], "o", color="black", markersize=4)
            words = f"window, slots 0 to {len(Schedule('scmoe', position).window)}"
            _box(axis, tap, y, 18.8 - tap, words, OTHER)
            axis.text(0.0, y, position.replace("pos", "Pos-"), va="center", fontweight="bold", fontsize=9)


def slots(path: Path) -> None:
    """Draw ScMoE at Pos-2 with the experts at each slot of its window (section 3.2)."""
    times = {choice: elapsed_time(choice, OperatorTimes(TIMES)) for choice in all_slots(Schedule("scmoe", "pos2"))}
    lines = {}
    for choice, time in times.items():
        note = ", shortest" if time == min(times.values()) else ""
        lines[f"{choice.place}{note}"] = play(choice.operators(), TIMES)
    draw(lines, path, "ScMoE (Pos-2): the same pair with its experts at each slot", UNIT)


def chunks(path: Path) -> None:
    """Draw the MoE stream of standard top-2 whole and in chunks: one chunk's experts hide another's transfer."""
    lines = {}
    for n in (1, 2, 4):
        choice = Schedule("top_k", chunks=n)
        lines["1 chunk" if n == 1 else f"{n} chunks"] = play(choice.operators(), per_chunk(choice, TOP2_TIMES))
    draw(lines, path, "Standard top-2: the rows of its MoE stream in chunks", UNIT)


def ranks(path: Path) -> None:
    """Draw the two All-to-Alls between two ranks that share four experts."""
    with chart(path, 3.0) as figure:
        axis = _canvas(figure.subplots(), 20, 9.6)
        columns = {"Gate,\nencode": 3.0, "Experts": 9.4, "Decode": 15.8}
        rows = {0: 6.9, 1: 2.1}
        for rank, y in rows.items():
            axis.text(0.0, y + 1.9, f"Rank {rank}", fontweight="bold", fontsize=9)
            axis.text(0.0, y, "own\ntokens", va="center", fontsize=SMALL)
            _arrow(axis, (1.8, y), (3.0, y))
            for label, x in columns.items():
                words = f"Experts\n{2 * rank}, {2 * rank + 1}" if label == "Experts" else label
                _box(axis, x, y, 2.8, words, COLORS.get(label.lower(), PAPER))
            _arrow(axis, (18.6, y), (19.9, y))
        for name, left, right in (("dispatch", 5.9, 9.3), ("combine", 12.3, 15.7)):
            for sender in rows.values():
                for receiver in rows.values():
                    _arrow(axis, (left, sender), (right, receiver), COLORS[name])
            axis.text((left + right) / 2, 8.0, name, ha="center", fontsize=9, color=COLORS[name])
        note = "Each token goes to the rank of its expert, and its result comes back."
        axis.text(0.0, 0.0, note, fontsize=SMALL, style="italic")


CONCEPTS = windows, slots, chunks, ranks


def _canvas(axis: Axes, width: float, height: float, bottom: float = 0.0) -> Axes:
    axis.set(xlim=(0, width), ylim=(bottom, height))
    axis.axis("off")
    return axis


def _box(axis: Axes, left: float, y: float, width: float, words: str, color: str | None = None) -> None:
    """Draw a box around the height y, with words in it. color: None is that of the operator of this name."""
    color = color or COLORS.get(words.lower().replace("\n", "_"), PAPER)
    ink = "white" if color in (*DARK, PAPER) else "black"
    axis.add_patch(FancyBboxPatch((left, y - 0.55), width, 1.1, boxstyle="round,pad=0.1", color=color))
    axis.text(left + width / 2, y, words, ha="center", va="center", color=ink, fontsize=SMALL, linespacing=0.95)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.3})
