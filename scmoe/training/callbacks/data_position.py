"""Counts the batches that have been trained on, so that every checkpoint knows its position in the data."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class DataPosition(Callback):
    """Advances the datamodule's position after each batch of training."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]
