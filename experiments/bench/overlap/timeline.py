"""One pair's operators, measured and planned, as charts in the manner of Fig. 7, and Chrome traces
of training steps.

The five timelines of the figure (TIMELINES) run on shaped links as in `bench overlap`. The report
says how long the transfers of each run beside computation, by the cost model with measured times:
section 1 says that the shortcut doubles this time of pipelining.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from experiments.bench.other_settings import TimelineSetting
from experiments.bench.rank_bench import Bench
from experiments.bench.rate_search import find_rate
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.engine.gantt import draw
from experiments.engine.profiles import recorded
from experiments.engine.ranks import run_ranks
from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError
from scmoe.moe.operators import Direction
from scmoe.moe.recorder import Recorder
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.planning.plan_file import plan_from_json
from scmoe.planning.pricing import DIRECTIONS, from_tap
from scmoe.report import Report, say
from scmoe.schedule.cost import mismatch, mismatch_bounds, per_chunk, play_block
from scmoe.schedule.play import Span, elapsed
from scmoe.schedule.stack import play_stack

TIMED_STEPS = 5
TIMELINES = {  # title: (block, transfers, numbers of chunks to choose from)
    "Top-2, sequential": ("top2", "sequential", (1,)),
    "Top-2, pipelined": ("top2", "overlapped", (2,)),
    "Shared expert, pipelined": ("shared_expert", "overlapped", (2,)),
    "ScMoE Pos-2, overlapped": ("pos2", "overlapped", (1,)),
    "ScMoE Pos-2, overlapped and pipelined": ("pos2", "overlapped", (2,)),
}
OVERLAPS = {  # columns of `overlaps_of`
    "beside computation": "{beside_computation_ms:.1f} ms",
    "over pipelined top-2": "{over_pipelined_top2:.2f}",
    "exposed": "{exposed_ms:.1f} ms",
    "Eq. 11": "{eq11_ms[1]:.1f} ms, from {eq11_ms[0]:.1f} to {eq11_ms[2]:.1f}",
}


def bench_timeline(setting: TimelineSetting, out: Path) -> dict[str, Any]:
    """Write a Gantt chart of forward and one of backward into `out`, and a Chrome trace of a
    training step of each timeline, operators named scmoe/<name> (open it in ui.perfetto.dev).

    The caller has entered a network namespace (experiments/engine/links.py).
    """
    require("bench timeline", "matplotlib")
    pair = Setting(setting.share, compute=setting.compute, ranks=setting.ranks)
    out.mkdir(parents=True, exist_ok=True)
    rate, timelines, overlaps = run_ranks(
        watch, pair.ranks, pair, out, timeout_s=900, own_links=True
    )[0]
    for direction in DIRECTIONS:
        machine = f"{pair.compute} compute, {pair.ranks} ranks, links of {rate:.0f} Mbit/s"
        path = out / f"{direction}.png"
        draw(
            timelines[direction],
            path,
            f"One pair from the tap to its end, {direction}: {machine}",
            "ms",
        )
        say(f"drawn: {path}")
    traces = [str(path) for path in sorted(out.glob("*.json"))]
    say(f"traces: {', '.join(traces)}")
    Report(
        "transfers of one pair, by the cost model with measured times:", overlaps, OVERLAPS
    ).show()
    return {"link_mbit": rate, "timelines": overlaps, "traces": traces}


def draw_plan(run_dir: Path) -> dict[str, Any]:
    """Draw the plan of a run, forward and backward, into its folder `analysis`. ConfigError: it has
    no plan."""
    path = run_dir / "plan.json"
    try:
        choice = plan_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--run is {str(run_dir)!r}, which has no plan: {error}. Give a run with schedule=auto"
            " that has chosen"
        ) from error
    pictures = []
    for direction in DIRECTIONS:
        rows = {}
        for number, layer in enumerate(choice.layers, 1):
            schedule = layer.schedule
            title = (
                f"MoE layer {number}: {schedule.name}, {schedule.place}, {schedule.chunks} chunk(s)"
            )
            rows[f"MoE layer {number}, sequential"] = planned_spans(
                layer, direction, sequential=True
            )
            if choice.batches == 1:
                rows[title] = planned_spans(layer, direction, sequential=False)
        if choice.batches == 2:
            rows |= planned_halves(choice, direction)
        picture = run_dir / "analysis" / f"plan-{direction}.png"
        words = (
            f"The plan of {run_dir.resolve().name}, from the tap to the end of a block, {direction}"
        )
        draw(rows, picture, words, "ms")
        say(f"drawn: {picture}")
        pictures.append(str(picture))
    return {"pictures": pictures}


def watch(
    rank: int, world_size: int, setting: Setting, out: Path
) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Run on every rank. Return the rate (Bench.set_rate), spans in ms by direction and title, and
    `overlaps_of` the timelines.

    The caller uses rank 0's result.
    """
    dist.init_process_group("gloo")
    bench = Bench(setting)
    rate = find_rate(setting, bench.set_rate, bench.infer)  # of the links, or of the bus
    timelines: dict[str, dict[str, list[Span]]] = {direction: {} for direction in DIRECTIONS}
    overlapped: dict[str, LayerChoice] = {}
    for title, (block, transfers, chunks) in TIMELINES.items():
        (choice,) = bench.choose(block, chunks).layers
        if transfers == "overlapped":
            overlapped[title] = choice
        variant = Variant(block, choice.schedule, transfers)
        for direction in DIRECTIONS:
            timelines[direction][f"{title}: planned"] = planned_spans(
                choice, direction, transfers == "sequential"
            )
            timelines[direction][f"{title}: measured"] = measured_spans(bench, variant, direction)
        trace(bench, variant, out / f"{block}-{transfers}-{choice.schedule.chunks}-chunks.json")
    return rate, timelines, overlaps_of(overlapped)


def overlaps_of(choices: Mapping[str, LayerChoice]) -> dict[str, dict[str, Any]]:
    """Return for each timeline how long transfers run beside computation in forward and backward,
    also over pipelined top-2; how long they are waited for; Eq. 11's mismatch, between its bounds.

    choices: by title, the first of pipelined top-2.
    """
    pipelined = next(iter(choices.values())).overlapped
    return {
        title: {
            "beside_computation_ms": 1e3 * choice.overlapped,
            "over_pipelined_top2": choice.overlapped / pipelined,
            "exposed_ms": 1e3 * choice.exposed,
            "eq11_ms": [1e3 * seconds for seconds in eq11_of(choice)],
        }
        for title, choice in choices.items()
    }


def eq11_of(choice: LayerChoice) -> tuple[float, float, float]:
    """Return the lower bound, the mismatch of the chosen slot, and the upper bound, of forward."""
    times = choice.times[choice.schedule.chunks]
    least, most = mismatch_bounds(choice.schedule, times)
    return least, mismatch(choice.schedule, times), most


def planned_spans(choice: LayerChoice, direction: Direction, sequential: bool) -> list[Span]:
    """Return the spans that the cost model predicts, in ms."""
    schedule = choice.schedule
    known = per_chunk(schedule, getattr(choice.times[schedule.chunks], direction))
    times = {op: 1e3 * t for op, t in known.items()}
    return play_block(schedule, times, direction == "backward", sequential)


def planned_halves(choice: ModelChoice, direction: Direction) -> dict[str, list[Span]]:
    """Return the spans of each half of the batch in all layers that the cost model predicts, in ms.

    `before` is all that a block computes before its tap.
    """
    spans = play_stack(choice.halves, direction)
    return {
        f"half {half + 1} in all MoE layers": [
            Span(span.operator, 1e3 * span.start, 1e3 * span.end)
            for span in spans
            if span.half == half
        ]
        for half in (0, 1)
    }


def measured_spans(bench: Bench, variant: Variant, direction: Direction) -> list[Span]:
    """Return the spans of the median of TIMED_STEPS training steps after a first one, in ms."""
    steps = []
    for _ in range(1 + TIMED_STEPS):
        recorder = Recorder(bench.device)
        step = bench.set(variant, recorder)
        dist.barrier()
        step.train(bench.x)
        _, spans = from_tap(recorder.spans(direction), direction)
        start = min(span.start for span in spans)
        steps.append(
            [Span(s.operator, 1e3 * (s.start - start), 1e3 * (s.end - start)) for s in spans]
        )
    return one_at_a_time(sorted(steps[1:], key=elapsed)[TIMED_STEPS // 2])


def one_at_a_time(spans: list[Span]) -> list[Span]:
    """Shorten transfers, which are noted from their launch on, to the time on the link: it carries
    one at a time."""
    shown, link_end = [], 0.0
    for span in sorted(spans, key=lambda span: span.end):
        if span.is_transfer:
            span = span._replace(start=max(span.start, link_end))
            link_end = span.end
        shown.append(span)
    return shown


def trace(bench: Bench, variant: Variant, path: Path) -> None:
    """Profile one training step; rank 0 writes a Chrome trace to `path`."""
    step = bench.set(variant)
    dist.barrier()
    profile = recorded(bench.device, lambda: step.train(bench.x))
    if dist.get_rank() == 0:
        profile.export_chrome_trace(str(path))
