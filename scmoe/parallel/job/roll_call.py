"""Who did not come: the note that a rank adds to the error of a collective that another rank left alone (fault 14).

A collective's own error says that time is up or that a connection is gone, not whose. So the survivors meet once more,
briefly, in a group that the broken collective has not touched. `dist.monitored_barrier` would do, but where rank 0 is
missing it takes the group's timeout, not its own.

Who is missing may be stopped, or compute for ever: with rank 0 gone nobody would end it. `take_along` does.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from scmoe.parallel.mesh import ParallelContext

ROLL_CALL_S = 3.0

LEFT_ALONE = re.compile(r"timed out|connection closed|connection reset|broken pipe", re.IGNORECASE)


def note_absent(error: BaseException, context: ParallelContext) -> list[int]:
    """Adds to `error`, if it is that of a collective, where this rank waited and for whom; returns the latter."""
    if not isinstance(error, RuntimeError) or not LEFT_ALONE.search(str(error)):
        return []
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}" if frames else "the start"
    absent = roll_call(context)
    if absent:
        answer = f"no answer from rank {', '.join(map(str, absent))}"
    else:
        answer = "all ranks answer now, so one was late" if context.rank == 0 else "rank 0 answers, and knows the rest"
    error.add_note(f"rank {context.rank} waited at {where}; roll call: {answer}")
    return absent


def roll_call(context: ParallelContext) -> list[int]:
    """The ranks that do not answer: rank 0 asks all, the others ask rank 0 alone."""
    group, deadline, absent = context.checkpoint_group, time.monotonic() + ROLL_CALL_S, []
    words = {rank: torch.zeros(1) for rank in (range(1, context.world_size) if context.rank == 0 else [0])}
    answers = {}
    for rank, word in words.items():
        try:
            answer = (dist.irecv if context.rank == 0 else dist.isend)(word, rank, group=group)
            assert answer is not None, "this rank is in the group"
            answers[rank] = answer
        except RuntimeError:  # its connection is gone
            absent.append(rank)
    for rank, answer in answers.items():
        try:
            answer.wait(timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            absent.append(rank)
    return sorted(absent)


def take_along(children: Sequence[subprocess.Popen[bytes]], absent: Sequence[int], parent: int | None) -> None:
    """When this process ends, after its traceback: no other of the job stays behind, stopped or stuck.

    children: the processes of local ranks 1, 2, ... where this one has started them. absent: those of them, by local
    rank, that did not answer: killed. The rest of them, and the parent (None: not of this job), are at most stopped:
    told to go on, they find themselves alone and end with a traceback of their own.
    """

    def end() -> None:
        for local_rank, child in enumerate(children, 1):
            child.send_signal(signal.SIGKILL if local_rank in absent else signal.SIGCONT)
        if parent is not None and os.getppid() == parent:
            os.kill(parent, signal.SIGCONT)

    atexit.register(end)
