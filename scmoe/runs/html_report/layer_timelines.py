"""Timelines of a MoE layer in the manner of Fig. 7: computation above, All-to-All below.

plan.json     what schedule=auto has measured and chosen, played by schedule/cost.py
traces/       with trainer.profile_steps, a Chrome trace: one forward pass of a layer
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scmoe.files import read_json
from scmoe.planning.plan_file import plan_from_json
from scmoe.planning.pricing import DIRECTIONS, LayerChoice, batches_in_flight, in_halves
from scmoe.runs.html_report.sources import Cleaner, Source, read_file
from scmoe.runs.html_report.svg import C1, C2, C3, C4, C5, C6, INK, MUTED, PAPER, SMALL, drawing
from scmoe.schedule.cost import TRANSFERS, Span, elapsed, per_chunk, play
from scmoe.schedule.schedule import PARTS
from scmoe.schedule.stack import play_halves

COLORS = {
    "attention": C1,
    "mlp": C6,
    "shared_expert": C3,
    "experts": C5,
    "dispatch": C2,
    "combine": C4,
}
LETTER = 0.018  # width of a letter over that of the axis
WAIT = " wait"  # ends the name of a wait in a trace
TURN = "batch "  # begins the name of a turn of one of several batches in flight (moe/turns.py)
Timelines = Mapping[str, Sequence[Span]]


def plan_drawings(run: Path) -> list[tuple[str, Markup]]:
    """Return caption and drawing of each MoE layer of a run's plan.json; none without a plan."""
    try:
        choices = plan_from_json(read_json(run / "plan.json"))
    except ValueError:
        return []
    if batches_in_flight(choices) == 2:
        return [halves_drawing(choices, direction) for direction in DIRECTIONS]
    drawings = []
    for layer, choice in enumerate(choices):
        schedule = choice.schedule
        chunks = "1 chunk" if schedule.chunks == 1 else f"{schedule.chunks} chunks"
        chosen = f"{schedule.place}, {chunks}"
        timelines = {
            f"{direction}, {'sequential' if sequential else chosen}": planned_spans(
                choice, direction, sequential
            )
            for direction in DIRECTIONS
            for sequential in (True, False)
        }
        caption = (
            f"MoE layer {layer}, {schedule.name}: as planned from measured operators, from the tap"
            " to the end of the block"
        )
        drawings.append((caption, draw_timelines(timelines, caption)))
    return drawings


def planned_spans(choice: LayerChoice, direction: Any, sequential: bool) -> list[Span]:
    """Return the spans that the cost model predicts, in ms."""
    schedule = choice.schedule
    forward = direction == "forward"
    operators = schedule.operators() if forward else schedule.backward_operators()
    times = per_chunk(schedule, getattr(choice.times[schedule.chunks], direction))
    return play(operators, {name: 1e3 * t for name, t in times.items()}, sequential)


def halves_drawing(choices: Sequence[LayerChoice], direction: Any) -> tuple[str, Markup]:
    """Return caption and drawing of two batches in flight through all MoE layers."""
    timelines = {
        f"half {number}": [Span(s.operator, 1e3 * s.start, 1e3 * s.end) for s in spans]
        for number, spans in enumerate(play_halves(in_halves(choices), direction), 1)
    }
    caption = f"Two batches in flight through all MoE layers, {direction}, as planned"
    return caption, draw_timelines(timelines, caption)


def trace_drawings(run: Path, clean: Cleaner) -> list[tuple[str, Markup]]:
    """Return caption and drawing of each Chrome trace of a run that holds an MoE layer."""
    files = sorted(run.glob("traces/*.json*"))
    found = [source for path in files for source in read_file(path, must=False)]
    sources = [replace(source, name=clean(source.name)) for source in found]
    return [made for source in sources if (made := trace_drawing(source)) is not None]


def trace_drawing(source: Source) -> tuple[str, Markup] | None:
    """Return caption and drawing of the first whole MoE layer in a trace; None: it has none."""
    timelines = measured_timelines(source.data["operators"])
    if not timelines:
        return None
    halves = ", of two batches in flight" if len(timelines) > 1 else ""
    caption = (
        f"Measured forward pass of an MoE layer{halves} ({source.name}); a transfer is shown from"
        " its launch to the end of its wait"
    )
    return caption, draw_timelines(timelines, caption)


def measured_timelines(operators: Sequence[Sequence[Any]]) -> dict[str, list[Span]]:
    """Return the spans of the first whole MoE layer in ms, from its tap on: of the batch, or of
    each half where two batches take turns. operators: as `first_layer`."""
    turns: dict[str, list[Sequence[Any]]] = {}
    for turn in operators:
        if turn[0].startswith(TURN):
            turns.setdefault(turn[0], []).append(turn)
    layers = {"forward, measured on the host": first_layer(operators)}
    if turns:
        layers = {
            f"half {name.removeprefix(TURN)}, forward, measured on the host": first_layer(
                [one for one in operators if _is_in_one_of(turns[name], one)]
            )
            for name in sorted(turns)
        }
    if not all(layers.values()):
        return {}
    tap = min(spans[0].start for spans in layers.values())
    return {
        name: [Span(s.operator, s.start - tap, s.end - tap) for s in spans]
        for name, spans in layers.items()
    }


def _is_in_one_of(turns: Sequence[Sequence[Any]], operator: Sequence[Any]) -> bool:
    name, begin_ms, _, thread = operator
    return not name.startswith(TURN) and any(
        turn[1] <= begin_ms < turn[2] and turn[3] == thread for turn in turns
    )


def first_layer(operators: Sequence[Sequence[Any]]) -> list[Span]:
    """Return the spans from the first `route` to the first `decode` after it, in ms; none if there
    is no such layer. The first span is that of `route`.

    operators: name, begin and end in ms, thread (sources.operators_of). Transfers are awaited in
    the order of their launches.
    """
    ordered = sorted(operators, key=lambda one: one[1])
    tap = next((one for one in ordered if one[0] == "route"), None)
    if tap is None:
        return []
    on_thread = [one for one in ordered if one[3] == tap[3] and one[1] >= tap[1]]
    end = next((one[2] for one in on_thread if one[0] == "decode"), None)
    if end is None:
        return []

    spans = list[Span]()
    in_flight: dict[str, list[float]] = {name: [] for name in TRANSFERS}
    for name, begin_ms, end_ms, _ in on_thread:
        operator = name.removesuffix(WAIT)
        if begin_ms > end:
            break
        if name in TRANSFERS:
            in_flight[name].append(begin_ms)
        elif operator in TRANSFERS:
            if in_flight[operator]:
                spans.append(Span(operator, in_flight[operator].pop(0), end_ms))
        else:
            spans.append(Span(operator, begin_ms, end_ms))
    return spans


def draw_timelines(timelines: Timelines, words: str) -> Markup:
    """Draw two rows for each timeline on one axis of milliseconds: computation, All-to-All."""
    end = max(elapsed(spans) for spans in timelines.values())
    with drawing(words, 0.6 + 0.82 * len(timelines)) as drawn:
        axis = drawn.figure.subplots()
        for number, (name, spans) in enumerate(timelines.items()):
            top = -3.4 * number
            for span in spans:
                row = top - (1 if span.is_transfer else 0)
                length = span.end - span.start
                title = span.operator.replace("_", " ")
                (bar,) = axis.barh(
                    row,
                    length,
                    left=span.start,
                    height=0.86,
                    color=color_of(span.operator),
                    edgecolor=PAPER,
                    linewidth=0.6,
                )
                bar.set_gid(drawn.tip(f"{title}: {span.start:.2f} to {span.end:.2f} ms"))
                if length > LETTER * end * len(title):
                    x = (span.start + span.end) / 2
                    axis.text(
                        x, row, title, ha="center", va="center", color=PAPER, fontsize=SMALL - 1
                    )
            total = elapsed(spans)
            axis.vlines(total, top - 1.5, top + 0.5, color=INK, linewidth=1.2)
            axis.text(total + 0.012 * end, top - 0.5, f"{total:.1f} ms", va="center")
            axis.text(0, top + 0.6, name, va="bottom")
        axis.set(xlim=(0, end * 1.22), xlabel="ms", yticks=[])
        axis.set_ylim(-3.4 * len(timelines) + 1.6, 1.7)
        axis.spines["left"].set_visible(False)
    return drawn.svg


def color_of(operator: str) -> str:
    """Return the colour of an operator; both parts of attention have attention's."""
    return COLORS.get("attention" if operator in PARTS else operator, MUTED)
