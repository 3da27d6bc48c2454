"""Shows the progress of a training in the terminal."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's rich bar without "epoch 0": a training is one long epoch of steps here."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
