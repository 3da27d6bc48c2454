"""Lightning's rich progress bar, named for what it counts."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's, named for what it counts: a training is one long epoch of steps here."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
