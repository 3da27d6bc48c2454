"""Prints a line per logged step, for job logs and pipes, which show no progress bar."""

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from scmoe.training.callbacks.logged_step import logs_now


class LogLines(Callback):
    """Prints the values of the progress bar on standard error of rank 0."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx) and trainer.is_global_zero:
            shown = trainer.progress_bar_metrics
            values = "  ".join(f"{name} {float(value):,.4g}" for name, value in shown.items() if name != "v_num")
            print(f"step {trainer.global_step}/{trainer.max_steps}  {values}", file=sys.stderr, flush=True)
