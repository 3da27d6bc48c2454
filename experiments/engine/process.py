"""What Linux says about this process: the memory that it holds, and how long its threads have waited for a core."""

import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


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


def waited_s() -> float:
    """Returns the seconds that the threads of this process have been ready to run and had no core, so far."""
    threads = os.listdir("/proc/self/task")
    return sum(int(Path(f"/proc/self/task/{t}/schedstat").read_text().split()[1]) for t in threads) / 1e9
