"""What Linux says about this process: the memory that it holds, and how long its threads have waited for a core."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def anonymous_mb() -> float:
    """Returns RssAnon in MB: memory that no file backs."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def peak_mb(step: Callable[[Any], object], batches: Iterable[Any]) -> float:
    """Returns the most anonymous memory that the process holds while `step` runs on each batch. A thread looks every
    millisecond, so a shorter peak inside a step may be missed."""
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


def undisturbed(run: Callable[[], Result], max_wait: float) -> tuple[Result, float | None]:
    """Returns what `run` returns and its seconds; None for these if the threads of this process were ready to run and
    had no core for more than a share max_wait of them."""
    waited, begun = _waited_s(), time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begun
    return result, seconds if _waited_s() - waited <= max_wait * seconds else None


def _waited_s() -> float:
    """Returns the seconds that the threads of this process have been ready to run and had no core, so far."""
    threads = os.listdir("/proc/self/task")
    return sum(int(Path(f"/proc/self/task/{t}/schedstat").read_text().split()[1]) for t in threads) / 1e9
