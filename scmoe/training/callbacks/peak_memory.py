"""Logs the peak of the memory of the rank that has the highest."""

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from scmoe.parallel.container_memory import GIB
from scmoe.training.callbacks.logged_steps import logs_now

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class PeakMemory(Callback):
    """Logs memory/host_gib, and memory/device_gib on GPUs: the peak since the start, of the rank
    with the highest one.

    host: resident pages of the process, with those of its libraries. device: what torch has
    allocated, without NCCL's own buffers. `at_end` has both at the end of the training; it is empty
    if there was none.
    """

    def __init__(self) -> None:
        self.at_end: dict[str, float] = {}

    def peaks(self, module: Any) -> dict[str, Tensor]:
        """Return both in GiB, as tensors on the device, so that nothing waits for them.

        Every rank must call it."""
        mesh = module.wire.mesh
        peaks = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB}
        if module.device.type == "cuda":
            peaks["device_gib"] = torch.cuda.max_memory_allocated(module.device) / GIB

        # A row for each peak and a column for each rank; the sum fills in those of other ranks.
        of_ranks = torch.zeros(
            len(peaks), mesh.world_size, dtype=torch.float64, device=module.device
        )
        for row, value in zip(of_ranks, peaks.values(), strict=True):
            row[mesh.rank] = value
        return dict(zip(peaks, mesh.sum_over_ranks(of_ranks).amax(1), strict=True))

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx):
            module.log_dict({f"memory/{name}": value for name, value in self.peaks(module).items()})

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Keep the values now: after the training the module is on the CPU, and NCCL sums nothing
        there."""
        self.at_end = {name: gib.item() for name, gib in self.peaks(module).items()}
