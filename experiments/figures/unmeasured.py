"""Fig. 4 and 7, which show no measurement: a pair of blocks with the shortcut, and two timelines.

The timelines are the cost model's: the operator times below are assumed, and stand in the titles.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from experiments.engine.gantt import DARK, OPERATOR_COLORS, draw, with_sublayers
from scmoe.charts import PAPER, SMALL, chart
from scmoe.schedule.cost import OperatorTimes, best_schedule
from scmoe.schedule.cost import slots as all_slots
from scmoe.schedule.play import BEFORE, Span, order_of, play
from scmoe.schedule.schedule import ATTENTION_PARTS, Schedule

# Units of one MLP: attention 3 (as in the testbed's emulated compute), and transfers such that a
# top-2 pair spends about half its time in them (testbed: share 0.52).
TIMES = {
    "attention": 3.0,
    **dict(zip(ATTENTION_PARTS, (2.4, 0.6), strict=True)),
    **dict.fromkeys(("mlp", "shared_expert", "experts"), 1.0),
    **dict.fromkeys(("dispatch", "combine"), 2.45),
    **dict.fromkeys(("route", "encode", "decode"), 0.1),
}
TOP2_TIMES = {  # twice the rows
    **TIMES,
    **{op: 2 * TIMES[op] for op in ("experts", "dispatch", "combine")},
}


def timelines(path: Path) -> None:
    """Draw a standard top-2 pair that waits for its transfers, and ScMoE at Pos-2 with the best
    slot (Fig. 7)."""
    whole = [
        choice for choice in all_slots(Schedule("scmoe", "pos2")) if not choice.inside_attention
    ]
    schedule = best_schedule(whole, {1: OperatorTimes(TIMES)})
    pairs = {
        "Standard top-2, sequential": pair_spans(
            Schedule("top_k"), TOP2_TIMES, ("attention", "mlp", "attention"), sequential=True
        ),
        f"ScMoE (Pos-2), experts at slot {schedule.slot}": pair_spans(
            schedule, TIMES, ("attention",)
        ),
    }
    title = (
        "One pair, forward, by the cost model (attention 3, MLP 1, All-to-All of one expert per"
        " token 2.45)"
    )
    draw(pairs, path, title, "time, in units of one MLP")


def pair_spans(
    schedule: Schedule, times: Mapping[str, float], before: Sequence[str], sequential: bool = False
) -> list[Span]:
    """Return when the operators of a pair run. before: its sub-layers before the tap."""
    whole = {**times, BEFORE: sum(times[operator] for operator in before)}
    spans = play(order_of([schedule], sequential=sequential), [whole])[0]
    return [*with_sublayers(spans, times, before)]


def pair(path: Path) -> None:
    """Draw Block-MLP and Block-MoE with the shortcut at Pos-2 (Fig. 4)."""
    with chart(path, 2.8) as figure:
        axis = canvas(figure.subplots(), 20.8, 6.6, bottom=-0.5)
        backbone, stream = 4.4, 1.5
        for i, label in enumerate(("Attention", "MLP", "Attention", "Shared\nexpert")):
            x = 2.5 + 4 * i
            box(axis, x - 1.08, backbone, 2.16, label)
            arrow(axis, (max(0.0, x - 2.75), backbone), (x - 1.25, backbone))
        arrow(axis, (15.75, backbone), (18.2, backbone))
        for i, label in enumerate(("Gate,\nencode", "Dispatch", "Experts", "Combine", "Decode")):
            x = 5.8 + 2.9 * i
            box(axis, x - 1.08, stream, 2.16, label)
            arrow(axis, (x - 1.65 if i else 4.1, stream), (x - 1.25, stream))
        axis.plot([4.1, 4.1], [backbone, stream], color="black", linewidth=1.3)
        axis.text(3.9, 2.9, "shortcut\n(tap, Pos-2)", ha="right", va="center", fontsize=SMALL)
        axis.plot([18.6, 18.9], [stream, stream], color="black", linewidth=1.3)
        arrow(axis, (18.9, stream), (18.9, backbone - 0.6))
        axis.text(
            18.9,
            backbone,
            "+",
            fontsize=14,
            ha="center",
            va="center",
            bbox={"boxstyle": "circle", "fc": "white"},
        )
        arrow(axis, (19.5, backbone), (20.8, backbone))
        axis.text(0.3, 5.9, "Block-MLP (layer l)", fontweight="bold")
        axis.text(9.0, 5.9, "Block-MoE (layer l+1)", fontweight="bold")
        axis.plot([8.5, 8.5], [3.2, 6.4], color="#999999", linestyle="--", linewidth=1)
        note = "MoE stream: its All-to-All (dispatch, combine) runs in\nparallel with the backbone"
        axis.text(0.3, -0.4, note, fontsize=SMALL, style="italic")


def canvas(axis: Axes, width: float, height: float, bottom: float = 0.0) -> Axes:
    axis.set(xlim=(0, width), ylim=(bottom, height))
    axis.axis("off")
    return axis


def box(
    axis: Axes, left: float, y: float, width: float, words: str, color: str | None = None
) -> None:
    """Draw a box around the height y, with words in it. color: None is that of the operator of this
    name."""
    color = color or OPERATOR_COLORS.get(words.lower().replace("\n", "_"), PAPER)
    ink = "white" if color in (*DARK, PAPER) else "black"
    axis.add_patch(
        FancyBboxPatch((left, y - 0.55), width, 1.1, boxstyle="round,pad=0.1", color=color)
    )
    axis.text(
        left + width / 2,
        y,
        words,
        ha="center",
        va="center",
        color=ink,
        fontsize=SMALL,
        linespacing=0.95,
    )


def arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black"
) -> None:
    axis.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.3}
    )
