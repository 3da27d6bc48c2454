"""Lightning's progress bar for a training that is one long epoch of steps."""

from shutil import get_terminal_size
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

BAR_COLUMNS = 10  # columns of the progress bar
WIDE = 120  # columns of a terminal that has room for all metrics on the bar's line


def shown_metrics(trainer: Any) -> dict[str, Any]:
    """Return the metrics of the progress bar, and train/loss.

    Reading the loss waits for the device; Lightning would read it after every batch on every rank,
    so it is not logged with prog_bar.
    """
    loss = {name: value for name, value in trainer.logged_metrics.items() if name == "train/loss"}
    return loss | trainer.progress_bar_metrics


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar, on standard error, without the epoch: a training is one long
    epoch of steps.

    In a terminal of fewer than WIDE columns each metric has its own line, so that its value stands
    beside its name. In training the values are those of the last logged step.
    """

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}
        between = " " if get_terminal_size().columns >= WIDE else "\n"
        super().__init__(
            theme=RichProgressBarTheme(metrics_text_delimiter=between),
            console_kwargs={"stderr": True},
        )

    def configure_columns(self, trainer: Any) -> list[Any]:
        """Return a short bar, and no batches per second, which the logged throughput says."""
        description, bar, batches, time, _ = super().configure_columns(trainer)
        bar.bar_width = BAR_COLUMNS
        return [description, bar, batches, time]

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        """Return the metrics without the logger's version."""
        trainer = arguments[0]
        if (
            not self.shown
            or not trainer.training
            or trainer.global_step % max(trainer.log_every_n_steps, 1) == 0
        ):
            self.shown = {name: float(value) for name, value in shown_metrics(trainer).items()}
        return self.shown

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
