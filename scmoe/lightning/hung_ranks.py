"""If ranks have died or hang, the others name them in their error and end the job (fault 14 of
docs/troubleshooting.md). The Strategy's `on_exception` calls it: after a collective has taken
longer than the Strategy's timeout_s, or its connection has closed. That is so over gloo. Over NCCL
torch ends a process whose collective has timed out, without an exception that could be caught.

The error of a collective only says that it timed out or that a connection closed. So the remaining
ranks contact each other once more, briefly, in a group that the broken collective has not used: a
roll call. `dist.monitored_barrier` would name the missing ranks too, but if rank 0 is missing it
waits for the group's timeout instead of its own. Processes that do not answer may be stopped or
stuck; they are ended when this one exits.
"""

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

from scmoe.parallel.mesh import Mesh

ROLL_CALL_S = 3.0
LEFT_ALONE = re.compile(r"timed out|connection closed|connection reset|broken pipe", re.IGNORECASE)


def note_absent(error: BaseException, mesh: Mesh) -> list[int]:
    """Return the ranks that do not answer; add them, and where this rank waited, to the error.

    If the error is not that of a collective that another rank has left, it stays as it is, and the
    list is empty.
    """
    if not isinstance(error, RuntimeError) or not LEFT_ALONE.search(str(error)):
        return []
    absent = roll_call(mesh)
    if absent:
        answer = f"no answer from rank {', '.join(map(str, absent))}"
    elif mesh.rank == 0:
        answer = "all ranks answer, so one was late"
    else:
        answer = "rank 0 answers; its error says more"
    error.add_note(f"rank {mesh.rank} waited at {innermost_line(error)}; roll call: {answer}")
    return absent


def innermost_line(error: BaseException) -> str:
    """Return the innermost line outside of installed packages where the error was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
    ]
    if not frames:
        return "the start"
    innermost = frames[-1]
    return f"{Path(innermost.filename).name}:{innermost.lineno}, {innermost.name}"


def roll_call(mesh: Mesh) -> list[int]:
    """Return the ranks that do not answer within ROLL_CALL_S.

    Rank 0 asks all, the others ask rank 0 alone.
    """
    group = mesh.checkpoint_group
    deadline = time.monotonic() + ROLL_CALL_S
    transfer = dist.irecv if mesh.rank == 0 else dist.isend
    asked = range(1, mesh.world_size) if mesh.rank == 0 else range(1)
    words = {rank: torch.zeros(1) for rank in asked}

    absent: list[int] = []
    answers = {}
    for rank, word in words.items():
        try:
            answer = transfer(word, rank, group=group)
            assert answer is not None, "this rank is in the group"
            answers[rank] = answer
        except RuntimeError:  # its connection is closed
            absent.append(rank)

    for rank, answer in answers.items():
        try:
            answer.wait(timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            absent.append(rank)
    return sorted(absent)


def end_job_at_exit(
    children: Sequence[subprocess.Popen[bytes]], absent: Sequence[int], parent: int | None
) -> None:
    """End the other processes of the job on this machine when this process exits.

    They may be stopped or stuck. children: local ranks 1, 2, ..., if this process has started them.
    Those in `absent` are killed. The others and the parent (its process id, if it is a rank of this
    job) are continued in case they are stopped: they then find themselves alone and end with a
    traceback of their own.
    """

    def end() -> None:
        for local_rank, child in enumerate(children, 1):
            child.send_signal(signal.SIGKILL if local_rank in absent else signal.SIGCONT)
        if parent is not None and os.getppid() == parent:
            os.kill(parent, signal.SIGCONT)

    atexit.register(end)
