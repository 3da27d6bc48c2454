"""Counts the images that could not be read and were skipped, over all ranks."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from scmoe.training.callbacks.log_lines import logs_now


class SkippedImages(Callback):
    """Logs data/skipped: how often a training of data.on_error=skip has met an image that cannot be read.

    `total` counts those of validations too. An image counts each time it is met.
    """

    def __init__(self) -> None:
        self.of_rank: Tensor = torch.zeros((), dtype=torch.int64)

    def total(self, pl_module: LightningModule) -> int:
        """Return the count of all ranks; each must call it."""
        context: Any = pl_module.parallel_context
        return int(context.sum_over_ranks(self.of_rank))

    def count(self, batch: dict[str, Tensor]) -> None:
        skipped = batch["skipped"].sum()
        self.of_rank = self.of_rank.to(skipped.device) + skipped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count(batch)
        if logs_now(trainer, batch_idx):
            pl_module.log("data/skipped", float(self.total(pl_module)))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        self.count(batch)
