"""The loggers of a run: metrics.csv, W&B unless it is disabled, TensorBoard if it is wanted.

None ends a run: while the disk is full, rows of metrics.csv are kept in memory, and TensorBoard stops (fault 32).
"""

import csv
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from scmoe.config.extras import install_command
from scmoe.config.fields import Config
from scmoe.config.leaves import flatten
from scmoe.training.files import redacted, warn_once
from scmoe.training.run.wandb_logger import HAS_WANDB, SafeWandbLogger, wandb_logger, wandb_mode

SHOWN = ("train/loss", "val/loss")  # on TensorBoard's page HParams


def build_loggers(config: Config, run_dir: Path, resumed_step: int | None) -> list[Logger]:
    """resumed_step: the step that a resumed run continues from."""
    loggers: list[Logger] = [csv_logger(run_dir, resumed_step)]
    if wandb_mode(config) != "disabled":
        loggers.append(wandb_logger(run_dir, config))
    elif config.logger.mode == "auto" and not HAS_WANDB:
        print(f"only metrics.csv is written; W&B needs wandb: {install_command('wandb')}", file=sys.stderr)
    if config.logger.tensorboard:
        loggers.append(tensorboard_logger(run_dir, config, resumed_step))
    return loggers


def describe(logger: Logger) -> str:
    if isinstance(logger, SafeWandbLogger):
        return f"Weights & Biases, {'offline' if logger.experiment.offline else 'online'}"
    return "TensorBoard" if isinstance(logger, SafeTensorBoardLogger) else "metrics.csv"


def close_loggers(loggers: Sequence[Logger], status: str = "success") -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, SafeWandbLogger):
            logger.close(status)


def log_inputs(loggers: Sequence[Logger], config: Config, state: Mapping[str, Any]) -> None:
    """Tell W&B which data set and tokenizer a training reads, by names and hashes. state: of the datamodule."""
    data = redacted(config.data)
    name = str(data.path) if data.name == "hf" else data.name
    facts = {"name": name, "subset": data.subset, "content": state.get("data")}
    for logger in of_wandb(loggers):
        logger.log_input("dataset", name, facts)
    if "tokenizer" in state:
        name = data.tokenizer if data.tokenizer in ("bpe", "gpt2") else Path(data.tokenizer).name
        for logger in of_wandb(loggers):
            logger.log_input("tokenizer", name, {"name": name, "content": state["tokenizer"]})


def log_results(
    loggers: Sequence[Logger], step: int, samples: Sequence[str], load: Path, callbacks: Iterable[object] = ()
) -> None:
    """Hand W&B what a run has at its end: the texts that its model has written, the heat map of its experts, and the
    best checkpoint with its metric."""
    for logger in of_wandb(loggers):
        import wandb  # here, as it is an extra

        if samples:
            logger.log_at_the_end("samples", wandb.Table(["step", "text"], [[step, text] for text in samples]), step)
        if load.exists():
            logger.log_at_the_end("moe/expert_load", wandb.Image(str(load)), step)
    for callback in callbacks:
        # a resumed run whose directory was moved, and that has not validated since, has a path and no score
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            for logger in of_wandb(loggers):
                path, value = Path(callback.best_model_path), callback.best_model_score.item()
                logger.log_checkpoint(path, callback.monitor, value)


def of_wandb(loggers: Sequence[Logger]) -> list[SafeWandbLogger]:
    return [logger for logger in loggers if isinstance(logger, SafeWandbLogger)]


def csv_logger(run_dir: Path, resumed_step: int | None) -> CSVLogger:
    """Return the logger of metrics.csv. It keeps the rows before resumed_step; later ones will be logged again.

    Lightning's logger deletes an earlier file.
    """
    path, kept = run_dir / "metrics.csv", []
    if resumed_step is not None and path.exists():
        with path.open(newline="") as file:
            whole = (row for row in csv.DictReader(file) if None not in row.values())  # a crash may leave half a row
            kept = [row for row in whole if int(row["step"]) < resumed_step]
    logger = SafeCSVLogger(run_dir, name="", version="")
    writer = logger.experiment
    if kept:
        writer.metrics_keys, writer.metrics = list(kept[0]), kept
        logger.save()
    return logger


class SafeCSVLogger(CSVLogger):
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
                _put_back(path, before)
            warn_once(f"{path} cannot be written, its rows stay in memory: {error.strerror or error}")


def _put_back(path: Path, before: bytes | None) -> None:
    """Give a file its earlier content. Where rows were only added it is cut, which takes no room on a full disk."""
    if before is None:
        path.unlink(missing_ok=True)
    elif path.stat().st_size >= len(before) and path.read_bytes()[: len(before)] == before:
        os.truncate(path, len(before))
    else:
        path.write_bytes(before)


def tensorboard_logger(run_dir: Path, config: Config, resumed_step: int | None) -> TensorBoardLogger:
    """resumed_step: events from this step on, which an earlier part of the run has left, are not shown."""
    logger = SafeTensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=resumed_step)
    logger.log_config(flatten(redacted(config)))
    return logger


class SafeTensorBoardLogger(TensorBoardLogger):
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
