"""Measures what a step takes: operators, kernels, waits and memory with torch's profiler, and the
process's memory as Linux reports it.

Events are those of a Chrome trace: dictionaries with `cat`, `name`, `ts` and `dur` in microseconds,
`tid` and `args`. A kernel belongs to the operator (scmoe/<name>) inside which the host launched it.
Operators are named in forward only.
"""

import gzip
import itertools
import json
import re
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Event = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
)
PREFIX = "scmoe/"
TOP = 10  # kernels that are listed


def recorded(device: torch.device, step: Callable[[], object]) -> profile:
    """Return the profile of one call of `step`, which the device has finished."""
    with profile(activities=activities_of(device)) as recording:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return recording


def activities_of(device: torch.device) -> list[ProfilerActivity]:
    """Return what is profiled: the host, and the device if there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def memory_profile() -> profile:
    """Return a profile of the host's allocations, to be entered or started."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def read_events(recording: profile, keep: Path | None = None) -> list[Event]:
    """Return the events of a profile. keep: write them there too, as a Chrome trace that is
    compressed by gzip."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recording.export_chrome_trace(str(path))
        text = path.read_bytes()
    if keep is not None:
        keep.write_bytes(gzip.compress(text))
    return json.loads(text)["traceEvents"]


def peak_bytes(device: torch.device, step: Callable[[], object]) -> int:
    """Return the peak memory of a step beyond what is allocated before it, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with memory_profile() as recording:
        step()
    return allocated_peak(recording)


def allocated_peak(recording: profile) -> int:
    """Return the most bytes that were allocated at a time, beyond those before the profile."""
    events = [e for e in read_events(recording) if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    changes = [event["args"]["Bytes"] for event in events]  # below 0 where memory is freed
    return max(itertools.accumulate(changes), default=0)


def spans(events: Iterable[Event]) -> list[Event]:
    """Return the events that have a begin and an end."""
    return [e for e in events if e.get("ph") == "X" and "cat" in e]


def within(events: Iterable[Event], name: str) -> list[Event]:
    """Return the events that the host began inside the range `name` (record_function), on any
    thread, and the work of the device that it launched there."""
    events = spans(events)
    outer = next(e for e in events if e["name"] == name and e["cat"] == "user_annotation")
    inside = [e for e in events if e["cat"] not in ON_DEVICE and contains(outer, e)]
    launched = {e["args"]["correlation"] for e in inside if e["cat"] in CALLS}
    return inside + [
        e for e in events if e["cat"] in ON_DEVICE and e["args"].get("correlation") in launched
    ]


def contains(outer: Event, inner: Event) -> bool:
    return outer["ts"] <= inner["ts"] < outer["ts"] + outer["dur"]


def innermost(events: Sequence[Event], call: Event, kind: str, prefix: str = "") -> str | None:
    """Return the name of the shortest range around a call on its thread."""
    around = [
        e for e in events if e["cat"] == kind and e["tid"] == call["tid"] and contains(e, call)
    ]
    around = [e for e in around if e is not call and e["name"].startswith(prefix)]
    return min(around, key=lambda e: e["dur"])["name"] if around else None


def operator_ms(events: Sequence[Event]) -> dict[str, float]:
    """Return the milliseconds of each operator in forward: of its work on the device, or, without
    one, on the host."""
    ranges = [e for e in events if e["cat"] == "user_annotation" and e["name"].startswith(PREFIX)]
    times_ms: defaultdict[str, float] = defaultdict(float)
    if not any(e["cat"] in ON_DEVICE for e in events):
        for e in ranges:
            times_ms[e["name"].removeprefix(PREFIX)] += e["dur"] / 1e3
        return dict(times_ms)
    operator_of = {
        call["args"]["correlation"]: innermost(ranges, call, "user_annotation", PREFIX)
        for call in events
        if call["cat"] in CALLS
    }
    for e in events:
        if e["cat"] in ON_DEVICE and (name := operator_of.get(e["args"].get("correlation"))):
            times_ms[name.removeprefix(PREFIX)] += e["dur"] / 1e3
    return dict(times_ms)


def device_work(events: Sequence[Event]) -> dict[str, Any]:
    """Return the number of kernels and copies, their milliseconds, and the kernels that take the
    most."""
    kernels = [e for e in events if e["cat"] == "kernel"]
    copies = [e for e in events if e["cat"] in ON_DEVICE and e["cat"] != "kernel"]
    by_name: Counter[str] = Counter()
    for e in kernels:
        by_name[e["name"][:80]] += e["dur"] / 1e3
    return {
        "kernels": len(kernels),
        "kernel_ms": sum(e["dur"] for e in kernels) / 1e3,
        "copies": len(copies),
        "copy_ms": sum(e["dur"] for e in copies) / 1e3,
        "longest_kernels_ms": dict(by_name.most_common(TOP)),
    }


def host_waits(events: Sequence[Event]) -> dict[str, int]:
    """Return how often the host waited for the device, by call, operator of torch and operator of
    the block."""
    waits: Counter[str] = Counter()
    for call in events:
        if call["cat"] in CALLS and call["name"] in WAITS:
            torchs = innermost(events, call, "cpu_op") or "outside an operator"
            ours = innermost(events, call, "user_annotation", PREFIX)
            waits[f"{call['name']} in {torchs}" + (f" of {ours}" if ours else "")] += 1
    return dict(waits)


def anonymous_mb() -> float:
    """Return RssAnon in MB: memory that no file backs."""
    match = re.search(
        r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.M
    )
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def peak_mb(step: Callable[[Any], object], batches: Iterable[Any]) -> float:
    """Return the most anonymous memory that the process holds while `step` runs on each batch. A
    thread looks every millisecond, so a shorter peak inside a step may be missed."""
    seen, done = [anonymous_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for batch in batches:
            step(batch)
            seen.append(anonymous_mb())
    finally:
        done.set()
        watcher.join()
    return max(seen)
