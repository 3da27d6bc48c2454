"""Progress as lines of text, where standard error is no terminal."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from scmoe.config.leaves import four_digits
from scmoe.lightning.seam.progress_bar import shown_metrics
from scmoe.report import say
from scmoe.training.callbacks.logged_steps import logs_now


class LogLines(Callback):
    """Prints the values of the progress bar as lines, for job logs and pipes.

    A logged step has a line, and a validation has one. Rank 0 prints them to standard error.
    """

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx) and trainer.is_global_zero:
            print_metrics(trainer, lambda name: not name.startswith("val/"))

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            print_metrics(trainer, lambda name: name.startswith("val/"))


def print_metrics(trainer: Trainer, wanted: Callable[[str], bool]) -> None:
    """Print a line of the metrics whose names are wanted."""
    metrics = {name: float(value) for name, value in shown_metrics(trainer).items() if wanted(name)}
    values = "  ".join(f"{name} {four_digits(value)}" for name, value in metrics.items())
    say(f"step {trainer.global_step}/{trainer.max_steps}  {values}")
