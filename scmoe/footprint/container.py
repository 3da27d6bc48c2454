"""The memory of the container in which this process runs, as its control group says (version 2)."""

import math
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def memory_limit() -> float:
    """Return the bytes that the container may use; infinite without a limit."""
    file = GROUP / "memory.max"
    limit = file.read_text().strip() if file.exists() else "max"
    return math.inf if limit == "max" else float(limit)


def memory_in_use() -> float:
    """Return the bytes that the container uses, without pages of files that are not in use: they are given back."""
    if not (GROUP / "memory.current").exists():
        return 0.0
    stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
    return float((GROUP / "memory.current").read_text()) - float(stat.get("inactive_file", 0))
