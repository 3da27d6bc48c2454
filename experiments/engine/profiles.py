"""What torch's profiler recorded, as plain events, and the memory that a step takes.

Events are those of a Chrome trace: dictionaries with `cat`, `name`, `ts` and `dur` in microseconds, `tid` and `args`.
"""

import gzip
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Event = dict[str, Any]


def recorded(device: torch.device, step: Callable[[], object], memory: bool = False) -> profile:
    """Returns the profile of one call of `step`, which the device has finished. memory: with every allocation."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, profile_memory=memory) as found:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return found


def events_of(found: profile, keep: Path | None = None) -> list[Event]:
    """Returns the events of a profile. keep: write them there too, as a Chrome trace that is compressed by gzip."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        text = path.read_bytes()
    if keep is not None:
        keep.write_bytes(gzip.compress(text))
    return json.loads(text)["traceEvents"]


def peak_bytes(device: torch.device, step: Callable[[], object]) -> int:
    """Most memory of the device that `step` holds over what it finds, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    events = [e for e in events_of(recorded(device, step, memory=True)) if e.get("name") == "[memory]"]
    changes = (e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))  # below 0 where memory is freed
    return max(itertools.accumulate(changes))
