"""Keeps the position in the data in every checkpoint."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class DataPosition(Callback):
    """Advances the datamodule's position after each batch, so that checkpoints keep it."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]
