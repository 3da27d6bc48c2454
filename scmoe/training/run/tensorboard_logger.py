"""The logger of TensorBoard: event files in tensorboard/ of the run directory. A full disk ends it, not the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from scmoe.training.files import warn_once


def tensorboard_logger(run_dir: Path, resumed_step: int | None) -> TensorBoardLogger:
    """resumed_step: events from this step on, which an earlier part of the run has left, are not shown."""
    return SteadyTensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=resumed_step)


class SteadyTensorBoardLogger(TensorBoardLogger):
    """Stops logging with one warning where its files cannot be written."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, action: Any, *arguments: Any) -> None:
        if self.lost:
            return
        try:
            action(*arguments)
        except OSError as error:
            self.lost = True
            warn_once(f"TensorBoard receives nothing more of this run: {error.strerror or error}")
