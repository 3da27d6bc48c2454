"""A rank that raises ends the whole job within seconds, and its own error is shown first (faults 13, 14).

When a collective fails because another rank left it, its error gets a note that names the missing rank. The
collective's own error only says that it timed out or that a connection closed. So the remaining ranks contact each
other once more, briefly, in a group that the broken collective has not used. `dist.monitored_barrier` would name the
missing ranks too, but if rank 0 is missing it waits for the group's timeout instead of its own.
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
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from scmoe.parallel.lightning_seam import started_ranks, was_interrupted
from scmoe.parallel.mesh import ParallelContext

ROLL_CALL_S = 3.0
LEFT_ALONE = re.compile(r"timed out|connection closed|connection reset|broken pipe", re.IGNORECASE)


class FailFastStrategy(DDPStrategy):
    """DDP in which a rank that has raised takes part in no further collective.

    The other ranks may be anywhere, and waiting for them would hide the error. Callbacks that save after an exception
    (OnExceptionCheckpoint, ModelCheckpoint(save_on_exception=True)) find every collective skipped.
    """

    def __init__(self, **ddp: Any) -> None:
        super().__init__(**ddp)
        self.context = ParallelContext()
        self.parent: int | None = None  # process id of local rank 0, if that process has started this one

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.is_launched:
            self.parent = os.getppid()

    @property
    def module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def is_launched(self) -> bool:
        """Whether another rank of this job has started this process, rather than torchrun or SLURM."""
        return isinstance(self.cluster_environment, LightningEnvironment) and self.local_rank > 0

    @property
    def is_alone(self) -> bool:
        """Whether this rank has raised and the other ranks may not know of it."""
        return self.context.world_size > 1 and was_interrupted(self.module.trainer)

    @property
    def is_global_zero(self) -> bool:
        """False on every rank that is alone: it must not remove or link checkpoints, because the save was skipped."""
        return super().is_global_zero and not self.is_alone

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_alone:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self.is_alone else super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if self.is_alone else super().reduce(tensor, *args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.context.world_size > 1:
            end_job_at_exit(started_ranks(self), note_absent(exception, self.context), self.parent)


def note_absent(error: BaseException, context: ParallelContext) -> list[int]:
    """Return the ranks that do not answer; add them, and where this rank waited, to the error.

    Any other error than that of a collective which was left alone stays as it is, and the list is empty.
    """
    if not isinstance(error, RuntimeError) or not LEFT_ALONE.search(str(error)):
        return []
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}" if frames else "the start"
    absent = roll_call(context)
    if absent:
        answer = f"no answer from rank {', '.join(map(str, absent))}"
    else:
        answer = "all ranks answer, so one was late" if context.rank == 0 else "rank 0 answers; its error says more"
    error.add_note(f"rank {context.rank} waited at {where}; roll call: {answer}")
    return absent


def roll_call(context: ParallelContext) -> list[int]:
    """Return the ranks that do not answer within ROLL_CALL_S: rank 0 asks all, the others ask rank 0 alone."""
    group, deadline, absent = context.checkpoint_group, time.monotonic() + ROLL_CALL_S, []
    words = {rank: torch.zeros(1) for rank in (range(1, context.world_size) if context.rank == 0 else [0])}
    answers = {}
    for rank, word in words.items():
        try:
            answer = (dist.irecv if context.rank == 0 else dist.isend)(word, rank, group=group)
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


def end_job_at_exit(children: Sequence[subprocess.Popen[bytes]], absent: Sequence[int], parent: int | None) -> None:
    """When this process exits, end the other processes of the job on this machine, which may be stopped or stuck.

    children: local ranks 1, 2, ..., if this process has started them. Those in `absent` are killed. The others and the
    parent (its process id, if it is a rank of this job) are continued in case they are stopped: they then find
    themselves alone and end with a traceback of their own.
    """

    def end() -> None:
        for local_rank, child in enumerate(children, 1):
            child.send_signal(signal.SIGKILL if local_rank in absent else signal.SIGCONT)
        if parent is not None and os.getppid() == parent:
            os.kill(parent, signal.SIGCONT)

    atexit.register(end)
