"""A rank that raises ends the whole job within seconds, and its own error is shown first (faults 13, 14)."""

import os
from typing import Any

from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from scmoe.lightning.roll_call import end_job_at_exit, note_absent
from scmoe.lightning.seam import started_ranks, was_interrupted
from scmoe.parallel.mesh import ParallelContext


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
