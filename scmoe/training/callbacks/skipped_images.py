"""Counts the images that could not be read."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from scmoe.training.callbacks.logged_steps import logs_now


class SkippedImages(Callback):
    """Logs data/skipped: how often an image could not be read (data.on_error=skip).

    An image counts each time it is met, in validations too. Checkpoints keep the count.
    """

    def __init__(self) -> None:
        self.of_rank: Tensor = torch.zeros((), dtype=torch.int64)

    def total(self, module: Any) -> int:
        """Return the sum over all ranks. Every rank must call it."""
        count = self.of_rank.to(module.device)  # a resumed count is on the host
        return int(module.wire.mesh.sum_over_ranks(count))

    def count(self, batch: dict[str, Tensor]) -> None:
        """Add the images of a batch that could not be read."""
        if "skipped" in batch:
            skipped = batch["skipped"].sum()
        else:  # a data set of an extension need not have it
            skipped = torch.zeros((), dtype=torch.int64, device=batch["images"].device)
        self.of_rank = self.of_rank.to(skipped.device) + skipped

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count(batch)
        if logs_now(trainer, batch_idx):
            module.log("data/skipped", float(self.total(module)))

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.count(batch)

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        count = self.of_rank.to(trainer.strategy.root_device, copy=True)  # reduce writes into it
        checkpoint["skipped_images"] = int(trainer.strategy.reduce(count, reduce_op="sum"))

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        # Rank 0 goes on from the sum of all ranks.
        count = checkpoint.get("skipped_images", 0) if trainer.is_global_zero else 0
        self.of_rank = torch.tensor(count)
