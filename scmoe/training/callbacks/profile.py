"""Records some steps with torch.profiler, on every rank: trainer.profile_steps=10:13 records steps 10, 11 and 12.

    <run>/traces/steps-10-13-rank-0.json.gz     a Chrome trace: open it at https://ui.perfetto.dev or chrome://tracing

Operators of the MoE stream and of its backbone are named scmoe/<operator>.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from scmoe.training.files import try_to_write


class ProfileSteps(Callback):
    """folder: the run directory on rank 0; other ranks get it from there, and it must exist for them too."""

    def __init__(self, steps: str, folder: Path | None) -> None:
        self.first, self.end = map(int, steps.split(":"))
        self.folder = folder
        self.running: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.running is None and self.first <= trainer.global_step < self.end:
            on_gpu = [ProfilerActivity.CUDA] if pl_module.device.type == "cuda" else []
            self.running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self.running.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.running is not None and trainer.global_step == self.end:
            self.write(trainer.global_rank, pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.running is not None:  # the run ends before the last step that was asked for
            self.write(trainer.global_rank, pl_module.device)

    def on_exception(self, *_: Any) -> None:
        if self.running is not None:
            self.running.stop()
            self.running = None

    def write(self, rank: int, device: torch.device) -> None:
        assert self.running is not None and self.folder is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that the trace holds the kernels of the last step
        self.running.stop()
        found, self.running = self.running, None
        path = self.folder / "traces" / f"steps-{self.first}-{self.end}-rank-{rank}.json.gz"
        try_to_write(path, lambda partial: found.export_chrome_trace(str(partial)))
