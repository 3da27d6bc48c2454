"""The loggers of a run: metrics.csv's, whose rows stay in memory while the disk is full (fault 32), and W&B's."""

import csv
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from scmoe.config.fields import Config
from scmoe.training.run.wandb_logger import SteadyWandbLogger, wandb_logger
from scmoe.training.run.writing import warn_once


def build_loggers(config: Config, run_dir: Path, resumed_step: int | None) -> list[Logger]:
    """Return metrics.csv's logger, and W&B's unless disabled. resumed_step: the step that the run continues from."""
    loggers: list[Logger] = [csv_logger(run_dir, resumed_step)]
    if config.logger.mode != "disabled":
        loggers.append(wandb_logger(run_dir, config))
    return loggers


def describe(logger: Logger) -> str:
    if isinstance(logger, SteadyWandbLogger):
        return f"Weights & Biases, {'offline' if logger.experiment.offline else 'online'}"
    return "metrics.csv"


def log_best_checkpoint(loggers: Sequence[Logger], callbacks: Iterable[object]) -> None:
    """Hand the best checkpoint with its step and metric to W&B, where there is one and W&B is on."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            assert callback.best_model_score is not None
            value = callback.best_model_score.item()
            for logger in loggers:
                if isinstance(logger, SteadyWandbLogger):
                    logger.log_checkpoint(Path(callback.best_model_path), callback.monitor, value)


def close_loggers(loggers: Sequence[Logger], status: str = "success") -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, SteadyWandbLogger):
            logger.close(status)


def csv_logger(run_dir: Path, resumed_step: int | None) -> CSVLogger:
    """Return the logger of metrics.csv. It keeps the rows before resumed_step; later ones will be logged again.

    Lightning's logger deletes an earlier file.
    """
    path, kept = run_dir / "metrics.csv", []
    if resumed_step is not None and path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) < resumed_step]
    logger = SteadyCSVLogger(run_dir, name="", version="")
    writer = logger.experiment
    if kept:
        writer.metrics_keys, writer.metrics = list(kept[0]), kept
        logger.save()
    return logger


class SteadyCSVLogger(CSVLogger):
    """Keeps rows in memory, with one warning, while they cannot be written.

    Lightning's logger would end the training and leave half a row, or, after a new column, half a file.
    """

    def save(self) -> None:
        writer, path = self.experiment, Path(self.experiment.metrics_file_path)
        before, keys = path.read_bytes() if path.exists() else None, list(writer.metrics_keys)
        try:
            super().save()
        except OSError as error:
            writer.metrics_keys = keys
            with suppress(OSError):
                path.unlink(missing_ok=True) if before is None else path.write_bytes(before)
            warn_once(f"{path} cannot be written, its rows stay in memory: {error.strerror or error}")
