"""Which batches are logged, and a line for each, for job logs and pipes, which show no progress bar."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


class LogLines(Callback):
    """Prints the values of the progress bar on standard error of rank 0: a line for a logged step, one for a
    validation."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx) and trainer.is_global_zero:
            say(trainer, [name for name in trainer.progress_bar_metrics if not name.startswith("val/")])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            say(trainer, [name for name in trainer.progress_bar_metrics if name.startswith("val/")])


def say(trainer: Trainer, names: Sequence[str]) -> None:
    shown = trainer.progress_bar_metrics
    values = "  ".join(f"{name} {float(shown[name]):,.4g}" for name in names if name != "v_num")
    print(f"step {trainer.global_step}/{trainer.max_steps}  {values}", file=sys.stderr, flush=True)
