"""Logs the most memory that a rank has held: on its host, and on its GPU if it has one."""

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from scmoe.training.callbacks.log_lines import logs_now

GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class Memory(Callback):
    """Logs memory/host_gib, and memory/device_gib on GPUs: the peak since the start, of the rank that has held most.

    host: resident pages of the process, those of its libraries included. device: what torch has allocated; NCCL's own
    buffers are not in it. `most` has both at the end of the training; it is empty if there was none.
    """

    def __init__(self) -> None:
        self.most: dict[str, float] = {}

    def peaks(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return both in GiB, on the device: nothing waits for it. Every rank must call it."""
        context: Any = pl_module.parallel_context
        own = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB}
        if pl_module.device.type == "cuda":
            own["device_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / GIB
        of_ranks = torch.zeros(len(own), context.world_size, dtype=torch.float64, device=pl_module.device)
        for row, value in zip(of_ranks, own.values(), strict=True):
            row[context.rank] = value
        return dict(zip(own, context.sum_over_ranks(of_ranks).amax(1), strict=True))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx):
            pl_module.log_dict({f"memory/{name}": value for name, value in self.peaks(pl_module).items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the values now: after the training the module is on the CPU, and NCCL sums nothing there."""
        self.most = {name: gib.item() for name, gib in self.peaks(pl_module).items()}
