"""Counts the batches that are trained on, so that every checkpoint knows its position in the data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


class DataPosition(Callback):
    """Tells the datamodule that a batch is done, so that every checkpoint knows where in the data it stands."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]
