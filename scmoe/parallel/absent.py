"""Who did not come: the note that a rank adds to the error of a collective that another rank left alone (fault 14).

A collective's own error says that time is up or that a connection is gone, not whose. So the survivors meet at a
barrier that names who is missing, in a group that the broken collective has not touched.
"""

from __future__ import annotations

import re
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scmoe.parallel.mesh import ParallelContext

ROLL_CALL = timedelta(seconds=3)
LEFT_ALONE = re.compile(r"timed out|connection closed|connection reset|broken pipe", re.IGNORECASE)


def note_absent(error: BaseException, context: ParallelContext) -> None:
    """Adds to `error`, if it is that of a collective, where this rank waited and for whom."""
    if not isinstance(error, RuntimeError) or not LEFT_ALONE.search(str(error)):
        return
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}" if frames else "the start"
    try:
        dist.monitored_barrier(context.checkpoint_group, timeout=ROLL_CALL, wait_all_ranks=True)
        answer = "all ranks answer now, so one was late"
    except RuntimeError as silence:
        answer = str(silence).splitlines()[0]
    error.add_note(f"rank {context.rank} waited at {where}; roll call: {answer}")
