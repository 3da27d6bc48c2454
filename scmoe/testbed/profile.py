"""The operators of a pair over time: planned and measured spans, and Chrome traces of training steps (Fig. 7)."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from scmoe.moe.operators import Direction, Recorder
from scmoe.parallel.pricing import LayerChoice
from scmoe.schedule.cost import per_chunk
from scmoe.schedule.timeline import Span, elapsed, play
from scmoe.testbed.overlap import Bench, Variant, find_rate
from scmoe.testbed.pairs import Setting

STEPS = 5
ROWS = {  # title: (block, way, numbers of chunks to choose from)
    "Top-2, sequential": ("top2", "sequential", (1,)),
    "Top-2, pipelined": ("top2", "overlapped", (2,)),
    "Shared expert, pipelined": ("shared_expert", "overlapped", (2,)),
    "ScMoE {}, overlapped": ("{}", "overlapped", (1,)),
    "ScMoE {}, overlapped and pipelined": ("{}", "overlapped", (2,)),
}


def watch(rank: int, world_size: int, setting: Setting, position: str, out: str) -> tuple[float, dict[str, Any]]:
    """Runs on every rank. Returns the links' rate in Mbit/s, and by direction {title: spans in ms}."""
    dist.init_process_group("gloo")
    bench = Bench(setting)
    rate = find_rate(bench, lambda line: print(line, file=sys.stderr) if rank == 0 else None)
    timelines: dict[str, dict[str, list[Span]]] = {"forward": {}, "backward": {}}
    for title, (block, way, chunks) in ROWS.items():
        title, block = title.format(position.capitalize().replace("s", "s-")), block.format(position)
        choice = bench.choose(block, chunks)
        variant = Variant(block, choice.schedule, way)
        for direction in ("forward", "backward"):
            planned = planned_spans(choice, direction, sequential=way == "sequential")
            timelines[direction][f"{title}: planned"] = planned
            timelines[direction][f"{title}: measured"] = measured_spans(bench, variant, direction)
        path = Path(out) / f"{block}-{way}-{choice.schedule.chunks}-chunks.json" if rank == 0 else None
        trace(bench, variant, path)
    return rate, timelines


def planned_spans(choice: LayerChoice, direction: Direction, sequential: bool) -> list[Span]:
    """The spans that the cost model predicts, in ms."""
    schedule = choice.schedule
    known = per_chunk(schedule, getattr(choice.times[schedule.chunks], direction))
    operators = schedule.operators() if direction == "forward" else schedule.backward_operators()
    return play(operators, {op: 1e3 * t for op, t in known.items()}, sequential)


def measured_spans(bench: Bench, variant: Variant, direction: Direction) -> list[Span]:
    """The spans of the median of STEPS training steps after a first one, in ms."""
    steps = []
    for _ in range(1 + STEPS):
        recorder = Recorder(bench.device)
        step = bench.set(variant, recorder)
        dist.barrier()
        step.backward(step.forward(bench.x))
        step.clear()
        steps.append(from_tap(recorder.spans(direction), direction))
    return in_turn(sorted(steps[1:], key=elapsed)[STEPS // 2])


def from_tap(spans: list[Span], direction: Direction) -> list[Span]:
    """Cuts spans (in seconds) to those from the tap to the end of the block, or back; in ms from the first on."""
    route = next(span for span in spans if span.operator == "route")
    if direction == "forward":
        spans = [span for span in spans if span.start >= route.start]
    else:
        spans = [span for span in spans if span.end <= route.end]
    start = spans[0].start
    return [Span(s.operator, 1e3 * (s.start - start), 1e3 * (s.end - start)) for s in spans]


def in_turn(spans: list[Span]) -> list[Span]:
    """Shortens transfers, which are noted from their launch on, to the time on the link: it carries one at a time."""
    shown, free = [], 0.0
    for span in sorted(spans, key=lambda span: span.end):
        if span.is_transfer:
            span = replace(span, start=max(span.start, free))
            free = span.end
        shown.append(span)
    return shown


def trace(bench: Bench, variant: Variant, path: Path | None) -> None:
    """Profiles one training step, and writes a Chrome trace to `path`."""
    step = bench.set(variant)
    dist.barrier()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    with profile(activities=activities) as recorded:
        step.backward(step.forward(bench.x))
    step.clear()
    if path is not None:
        recorded.export_chrome_trace(str(path))
