"""The pictures of docs/concepts.md: windows, slots, chunks, the two All-to-Alls between ranks, and
the three ways to hide them; and the learning rates of docs/configuration.md.

They show no measurement. The timelines are the cost model's, of the operator times that
experiments/figures/unmeasured.py assumes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.engine.gantt import OPERATOR_COLORS, OTHER, draw, with_sublayers
from experiments.figures.unmeasured import TIMES, TOP2_TIMES, arrow, box, canvas
from scmoe.charts import PAPER, SMALL, chart
from scmoe.schedule.cost import OperatorTimes, best_schedule, elapsed_time, per_chunk, play_block
from scmoe.schedule.cost import slots as all_slots
from scmoe.schedule.play import BEFORE, Span
from scmoe.schedule.schedule import POSITIONS, Schedule
from scmoe.schedule.stack import half_of, play_stack
from scmoe.training.learning_rate import LearningRate

UNIT = "time from the tap, in units of one MLP"


def windows(path: Path) -> None:
    """Draw the sub-layers of a pair, and below them the tap and the window of each position
    (section 3.1)."""
    with chart(path, 2.5) as figure:
        axis = canvas(figure.subplots(), 20, 8.3)
        lefts = (3.0, 7.2, 11.4, 15.6)
        for left, label in zip(
            lefts, ("Attention", "MLP", "Attention", "Shared\nexpert"), strict=True
        ):
            arrow(axis, (left - 1.4, 6.6), (left, 6.6))
            box(axis, left, 6.6, 2.8, label)
        arrow(axis, (18.4, 6.6), (19.9, 6.6))
        axis.text(3.0, 8.0, "Block-MLP", fontweight="bold", fontsize=9, va="center")
        axis.text(11.4, 8.0, "Block-MoE", fontweight="bold", fontsize=9, va="center")
        for i, (position, sublayers) in enumerate(POSITIONS.items()):
            tap, y = lefts[len(lefts) - 1 - sublayers] - 0.7, 4.3 - 1.7 * i
            axis.plot([tap, tap], [6.6, y], color="black", linewidth=1, linestyle=":")
            axis.plot([tap], [6.6], "o", color="black", markersize=4)
            words = f"window, slots 0 to {len(Schedule('scmoe', position).window)}"
            box(axis, tap, y, 18.8 - tap, words, OTHER)
            axis.text(
                0.0, y, position.replace("pos", "Pos-"), va="center", fontweight="bold", fontsize=9
            )


def slots(path: Path) -> None:
    """Draw ScMoE at Pos-2 with the experts at each slot of its window (section 3.2)."""
    times = {
        choice: elapsed_time(choice, OperatorTimes(TIMES))
        for choice in all_slots(Schedule("scmoe", "pos2"))
    }
    lines = {}
    for choice, time in times.items():
        note = ", shortest" if time == min(times.values()) else ""
        lines[f"{choice.place}{note}"] = play_block(choice, TIMES)
    draw(lines, path, "ScMoE (Pos-2): the same pair with its experts at each slot", UNIT)


def chunks(path: Path) -> None:
    """Draw the MoE stream of standard top-2 whole and in chunks: one chunk's experts hide another's
    transfer."""
    lines = {}
    for n in (1, 2, 4):
        choice = Schedule("top_k", chunks=n)
        lines["1 chunk" if n == 1 else f"{n} chunks"] = play_block(
            choice, per_chunk(choice, TOP2_TIMES)
        )
    draw(lines, path, "Standard top-2: the rows of its MoE stream in chunks", UNIT)


def ranks(path: Path) -> None:
    """Draw the two All-to-Alls between two ranks that share four experts."""
    with chart(path, 3.0) as figure:
        axis = canvas(figure.subplots(), 20, 9.6)
        columns = {"Gate,\nencode": 3.0, "Experts": 9.4, "Decode": 15.8}
        rows = {0: 6.9, 1: 2.1}
        for rank, y in rows.items():
            axis.text(0.0, y + 1.9, f"Rank {rank}", fontweight="bold", fontsize=9)
            axis.text(0.0, y, "own\ntokens", va="center", fontsize=SMALL)
            arrow(axis, (1.8, y), (3.0, y))
            for label, x in columns.items():
                words = f"Experts\n{2 * rank}, {2 * rank + 1}" if label == "Experts" else label
                box(axis, x, y, 2.8, words, OPERATOR_COLORS.get(label.lower(), PAPER))
            arrow(axis, (18.6, y), (19.9, y))
        for name, left, right in (("dispatch", 5.9, 9.3), ("combine", 12.3, 15.7)):
            for sender in rows.values():
                for receiver in rows.values():
                    arrow(axis, (left, sender), (right, receiver), OPERATOR_COLORS[name])
            axis.text(
                (left + right) / 2, 8.0, name, ha="center", fontsize=9, color=OPERATOR_COLORS[name]
            )
        note = "Each token goes to the rank of its expert, and its result comes back."
        axis.text(0.0, 0.0, note, fontsize=SMALL, style="italic")


def ways(path: Path) -> None:
    """Draw two pairs, forward: top-2 that waits, top-2 in chunks and with two batches in flight,
    and the shortcut."""
    in_pair = ("attention", "mlp", "attention")
    one = Schedule("top_k")
    first, second = played(one, TOP2_TIMES, in_pair, batches=2)
    whole = [
        choice for choice in all_slots(Schedule("scmoe", "pos2")) if not choice.inside_attention
    ]
    best = best_schedule(whole, {1: OperatorTimes(TIMES)})
    lines = {
        "Standard top-2, one batch": played(one, TOP2_TIMES, in_pair)[0],
        "Standard top-2, 2 chunks": played(Schedule("top_k", chunks=2), TOP2_TIMES, in_pair)[0],
        "Standard top-2, two batches in flight: first half": first,
        "The same rank: second half": second,
        f"ScMoE (Pos-2), {best.place}": played(best, TIMES, ("attention",))[0],
    }
    draw(
        lines, path, "Two pairs, forward: three ways to hide transfers", "time, in units of one MLP"
    )


def played(
    schedule: Schedule, times: Mapping[str, float], before: Sequence[str], batches: int = 1
) -> list[list[Span]]:
    """Return when the operators of two pairs run, of each batch in flight.

    times: of a whole batch. before: what a pair computes before its tap.
    """
    pair = OperatorTimes({**times, BEFORE: sum(times[operator] for operator in before)})
    layer = (schedule, pair if batches == 1 else half_of(pair))
    spans = [*with_sublayers(play_stack([layer, layer], batches=batches), times, before)]
    return [[span for span in spans if span.half == half] for half in range(batches)]


def learning_rates(path: Path) -> None:
    """Draw the schedules of the learning rate over 100 steps, 10 of them warm-up."""
    steps = range(101)
    with chart(path, 2.2) as figure:
        axis = figure.subplots()
        for kind in ("cosine", "wsd", "constant"):
            rate = LearningRate(kind, max_steps=100, warmup_steps=10)
            axis.plot(steps, [rate.ratio(step) for step in steps], label=kind)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("share of optim.lr")
        axis.set_ylim(0, 1.05)
        axis.legend()


CONCEPTS = windows, slots, chunks, ranks, ways, learning_rates
