"""Memory of this machine, and of the container that this process runs in, which may be less."""

import math
import os
from pathlib import Path

GIB = 2**30
CONTAINER = Path("/sys/fs/cgroup")  # the control group of this process, version 2


def machine_memory() -> float:
    """Return the bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def memory_limit() -> float:
    """Return the bytes that the container of this process may use; infinite without a limit."""
    file = CONTAINER / "memory.max"
    limit = file.read_text(encoding="utf-8").strip() if file.exists() else "max"
    return math.inf if limit == "max" else float(limit)


def memory_in_use() -> float:
    """Return the bytes that the container uses.

    Pages of files that are not in use are left out, because the kernel frees them when it needs
    memory.
    """
    if not (CONTAINER / "memory.current").exists():
        return 0.0
    stat = dict(
        line.split()
        for line in (CONTAINER / "memory.stat").read_text(encoding="utf-8").splitlines()
    )
    return float((CONTAINER / "memory.current").read_text(encoding="utf-8")) - float(
        stat.get("inactive_file", 0)
    )
