"""The logger of TensorBoard: event files in tensorboard/ of the run directory. A full disk ends it, not the run."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from scmoe.config.fields import Config
from scmoe.config.leaves import flatten
from scmoe.training.files import warn_once
from scmoe.training.redact import redacted

SHOWN = ("train/loss", "val/loss")


def tensorboard_logger(run_dir: Path, config: Config, resumed_step: int | None) -> TensorBoardLogger:
    """resumed_step: events from this step on, which an earlier part of the run has left, are not shown."""
    logger = SteadyTensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=resumed_step)
    logger.log_config(flatten(redacted(config)))
    return logger


class SteadyTensorBoardLogger(TensorBoardLogger):
    """Stops logging with one warning where its files cannot be written."""

    lost = False

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Fill the page HParams, whose columns of results are the losses that will be logged."""
        self._try(self._hparams, {key: v if isinstance(v, (bool, int, float)) else str(v) for key, v in values.items()})

    def _hparams(self, values: dict[str, Any]) -> None:
        package = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
        self.hparams.update(values)
        for part in import_module(f"{package}.summary").hparams(values, dict.fromkeys(SHOWN, 0.0)):
            self.experiment.file_writer.add_summary(part)

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
