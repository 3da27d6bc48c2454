"""Logs each row under the optimizer step that it belongs to."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from scmoe.parallel.lightning_seam import count_steps_from


class LoggedStep(Callback):
    """Counts from 0, in a resumed run too: after a stop between two batches Lightning's own count is one ahead."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        count_steps_from(trainer, trainer.global_step)
