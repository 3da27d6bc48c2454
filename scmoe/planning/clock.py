"""One clock for every measurement: variants in turn, ratios within a round, medians.

The speed of a shared machine drifts, so a variant is compared only with what ran in the same round.
Where ranks measure together, a round counts as the slowest rank has it.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

CPU = torch.device("cpu")
Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def seconds(run: Callable[[], Any], device: torch.device = CPU) -> float:
    """Return the time of one call: on the host's clock, on CUDA between two events of the current
    stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def undisturbed(run: Callable[[], Result], max_wait: float) -> tuple[Result, float | None]:
    """Return what `run` returns and its seconds; None in place of seconds if this process was
    disturbed: its threads waited for a core for more than max_wait times the seconds."""
    waited, begun = _waited_s(), time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begun
    return result, seconds if _waited_s() - waited <= max_wait * seconds else None


def _waited_s() -> float:
    """Return the seconds that the threads of this process have been ready to run and had no core,
    so far."""
    files = Path("/proc/self/task").glob("*/schedstat")
    waited_ns = [int(file.read_text(encoding="utf-8").split()[1]) for file in files]
    return sum(waited_ns) / 1e9


def in_turn(
    variants: Mapping[Name, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    over_ranks: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[Name, np.ndarray]:
    """Run all variants once in each round, after rounds to warm up that are left out.

    variants: each returns what it has measured, a number or nested sequences of numbers.
    over_ranks: every rank calls this, and each number is that of the slowest rank. say: gets a line
    a round. Return [..., rounds] by variant.
    """
    measured: dict[Name, list[Any]] = {name: [] for name in variants}
    for i in range(warm_up + rounds):
        if say is not None:
            say(f"round {max(0, i + 1 - warm_up)} of {rounds}, {len(variants)} variants")
        for name, run in variants.items():
            measured[name].append(run())
    kept = {
        name: np.asarray(values[warm_up:], dtype=np.float64) for name, values in measured.items()
    }
    return {
        name: np.moveaxis(slowest(values) if over_ranks else values, 0, -1)
        for name, values in kept.items()
    }


def slowest(values: Any) -> np.ndarray:
    """Return the maximum of each number over all ranks. Every rank must call it. values: numbers,
    nested equally."""
    worst = torch.as_tensor(np.asarray(values, dtype=np.float64))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.numpy()


def median(values: Any) -> float:
    """Return the median."""
    return float(statistics.median(values))


def quartiles(values: Any) -> list[float]:
    """Return the first and the third quartile; of two values these themselves."""
    first, _, third = statistics.quantiles(values, n=4)
    return [float(max(first, min(values))), float(min(third, max(values)))]
