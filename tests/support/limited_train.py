"""This program is the train command in a process whose memory must not grow by more than
SCMOE_LIMIT_GIB.

Address space is limited too, so that a runaway ends early, but by more: threads reserve it without
using it.
"""

import os
import resource
import sys
from pathlib import Path

from scmoe.command_line import call

GIB = 2**30
RESERVED_GIB = 8  # for the stacks and the heaps of threads


def used(column: int) -> int:
    """Return bytes of this process: 0: address space, 1: resident."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


if __name__ == "__main__":
    growth, resident = float(os.environ["SCMOE_LIMIT_GIB"]), used(1)
    allowed = used(0) + int((growth + RESERVED_GIB) * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    code = call("train", *sys.argv[1:])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    sys.exit(
        f"memory grew by {grown / GIB:.1f} GiB, allowed: {growth:g}"
        if grown > growth * GIB
        else code
    )
