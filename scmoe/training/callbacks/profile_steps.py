"""Writes traces of chosen steps."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from scmoe.files import try_to_write


def record_every_step(step: int) -> ProfilerAction:
    """Return what a profiler does in a step. Without a schedule its trace has no steps."""
    return ProfilerAction.RECORD


class ProfileSteps(Callback):
    """Records some steps with torch.profiler, on every rank.

    trainer.profile_steps=10:13 records steps 10, 11 and 12:

        <run>/traces/steps-10-13-rank-0.json.gz    a Chrome trace: open it at
                                                   https://ui.perfetto.dev or chrome://tracing

    Steps are named ProfilerStep#0 and so on, by which `scmoe advise measured=` finds them, and
    operators of the MoE stream and of its backbone scmoe/<operator>. folder: the run directory on
    rank 0; other ranks get it from there, and it must exist for them too.
    """

    def __init__(self, steps: str, folder: Path | None) -> None:
        self.first, self.end = map(int, steps.split(":"))
        self.folder = folder
        self.running: profile | None = None
        self.step = 0  # of the last batch

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.running is None and self.first <= trainer.global_step < self.end:
            on_gpu = [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
            self.running = profile(
                activities=[ProfilerActivity.CPU, *on_gpu], schedule=record_every_step
            )
            self.running.start()
        elif self.running is not None and trainer.global_step > self.step:
            self.running.step()
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.end:
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Write the trace. The run may end before the last step that was asked for."""
        if module.device.type == "cuda":  # the trace must hold the kernels of the last step
            torch.cuda.synchronize(module.device)
        trace = self.stop()
        if trace is not None:
            assert self.folder is not None
            name = f"steps-{self.first}-{self.end}-rank-{trainer.global_rank}.json.gz"
            path = self.folder / "traces" / name
            try_to_write(path, lambda partial: trace.export_chrome_trace(str(partial)))

    def on_exception(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> profile | None:
        """Stop recording and return the trace; None where nothing is recorded."""
        trace, self.running = self.running, None
        if trace is not None:
            trace.stop()
        return trace
