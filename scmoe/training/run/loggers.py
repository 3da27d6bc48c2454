"""The loggers of a run: metrics.csv, W&B unless it is disabled, TensorBoard if it is enabled.

Once training has started, no logger ends a run. While the disk is full, rows of metrics.csv are
kept in memory; TensorBoard and W&B stop with one warning (fault 32).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from scmoe.config.fields import Config
from scmoe.config.installation import install_command
from scmoe.config.leaves import flatten
from scmoe.files import warn_once
from scmoe.report import say
from scmoe.training.run.directory import read_metrics
from scmoe.training.run.wandb_logger import HAS_WANDB, SafeWandbLogger, wandb_logger, wandb_mode

# The first columns of metrics.csv; others follow by their names.
FIRST_COLUMNS = ("step", "train/tokens", "train/images", "train/loss", "val/loss")
HPARAMS_METRICS = ("train/loss", "val/loss")  # on TensorBoard's page HParams


def build_loggers(
    config: Config, run_dir: Path, resumed_step: int | None, validates_again: bool = False
) -> list[Logger]:
    """Return the loggers of a run. config: without keys and passwords. resumed_step: the step that
    a resumed run continues from. validates_again: it first does that step's validation."""
    loggers: list[Logger] = [csv_logger(run_dir, resumed_step, validates_again)]
    if config.logger.tensorboard:
        loggers.append(tensorboard_logger(run_dir, config, resumed_step))
    if wandb_mode(config) != "disabled":
        loggers.append(wandb_logger(run_dir, config))
    elif config.logger.mode == "auto" and not HAS_WANDB:
        say(f"W&B is not used; it needs wandb: {install_command('wandb')}")
    return loggers


def describe(logger: Logger) -> str:
    """Return the logger's name for the console."""
    if isinstance(logger, SafeWandbLogger):
        return f"Weights & Biases, {'offline' if logger.experiment.offline else 'online'}"
    return "TensorBoard" if isinstance(logger, SafeTensorBoardLogger) else "metrics.csv"


def log_inputs(loggers: Sequence[Logger], config: Config, state: Mapping[str, Any]) -> None:
    """Log the data set and the tokenizer of a training at W&B.

    config: without keys and passwords. state: of the datamodule.
    """
    for logger in loggers:
        if isinstance(logger, SafeWandbLogger):
            logger.log_inputs(config, state)


def log_results(
    loggers: Sequence[Logger],
    step: int,
    samples: Sequence[str],
    load: Path,
    summary: Mapping[str, Any],
    callbacks: Iterable[object] = (),
) -> None:
    """Log what a run has at its end. load: the heat map of its experts, which need not exist."""
    for logger in loggers:
        if isinstance(logger, SafeTensorBoardLogger):
            logger.log_results(step, samples, load)
        if isinstance(logger, SafeWandbLogger):
            logger.log_results(step, samples, load, summary, callbacks)


def close_loggers(loggers: Sequence[Logger], status: str = "success") -> None:
    """Write and upload what is left. status: success or failed."""
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, SafeWandbLogger):
            logger.close(status)


# ---------------------------------------------------------------------- metrics.csv


def csv_logger(run_dir: Path, resumed_step: int | None, validates_again: bool = False) -> CSVLogger:
    """Return the logger of metrics.csv.

    It keeps the rows before resumed_step, without those of a validation that is done again; others
    will be logged again. Lightning's logger would delete an earlier file.
    """
    kept = []
    if resumed_step is not None:
        rows = read_metrics(run_dir)
        kept = [row for row in rows if _is_kept(row, resumed_step, validates_again)]
    logger = SafeCSVLogger(run_dir, name="", version="")
    writer = logger.experiment
    writer.metrics_keys = Columns()
    if kept:
        writer.metrics_keys.extend(kept[0])
        writer.metrics = kept
        logger.save()
    return logger


def _is_kept(row: Mapping[str, str], resumed_step: int, validates_again: bool) -> bool:
    step = int(row["step"]) + 1  # rows count from 0
    is_repeated = validates_again and step == resumed_step and bool(row.get("val/loss"))
    return step <= resumed_step and not is_repeated


class Columns(list[str]):
    """The names of columns. Lightning's writer sorts them when there is a new one."""

    def sort(self, **_: Any) -> None:
        super().sort(
            key=lambda name: (
                FIRST_COLUMNS.index(name) if name in FIRST_COLUMNS else len(FIRST_COLUMNS),
                name,
            )
        )


class SafeCSVLogger(CSVLogger):
    """Keeps rows in memory, with one warning, while they cannot be written.

    Lightning's logger would end the training and leave half a row, or, after a new column, half a
    file.
    """

    def save(self) -> None:
        writer = self.experiment
        path = Path(writer.metrics_file_path)
        before = path.read_bytes() if path.exists() else None
        keys = Columns(writer.metrics_keys)
        try:
            super().save()
        except OSError as error:
            writer.metrics_keys = keys
            with suppress(OSError):
                _put_back(path, before)
            warn_once(
                f"{path} cannot be written, its rows stay in memory: {error.strerror or error}"
            )


def _put_back(path: Path, before: bytes | None) -> None:
    """Give a file its earlier content. Where rows were only added the file is cut, which needs no
    space on a full disk."""
    if before is None:
        path.unlink(missing_ok=True)
    elif path.read_bytes().startswith(before):
        os.truncate(path, len(before))
    else:
        path.write_bytes(before)


# ---------------------------------------------------------------------- TensorBoard


def tensorboard_logger(
    run_dir: Path, config: Config, resumed_step: int | None
) -> TensorBoardLogger:
    """Return the logger of TensorBoard. config: without keys and passwords. resumed_step: events
    from this step on, which an earlier part of the run has left, are not shown."""
    logger = SafeTensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=resumed_step)
    logger.log_config(flatten(config))
    return logger


class SafeTensorBoardLogger(TensorBoardLogger):
    """Stops logging with one warning where its files cannot be written."""

    lost = False

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Fill the page HParams, whose columns of results are the losses that will be logged."""
        self._try(
            self._hparams,
            {key: v if isinstance(v, (bool, int, float)) else str(v) for key, v in values.items()},
        )

    def _hparams(self, values: dict[str, Any]) -> None:
        package = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
        self.hparams.update(values)
        for part in import_module(f"{package}.summary").hparams(
            values, dict.fromkeys(HPARAMS_METRICS, 0.0)
        ):
            self.experiment.file_writer.add_summary(part)

    def log_results(self, step: int, samples: Sequence[str], load: Path) -> None:
        """Show texts of the model on the page Text, and the heat map of its experts on the page
        Images. load: its file, which need not exist."""
        for number, text in enumerate(samples, 1):
            self._try(self.experiment.add_text, f"samples/{number}", text, step)
        # it has drawn the file, but perhaps for the part of the run before this one
        if load.exists() and find_spec("matplotlib"):
            from matplotlib.image import imread

            pixels_HWC = imread(load)
            add_image = partial(self.experiment.add_image, dataformats="HWC")
            self._try(add_image, "moe/expert_load", pixels_HWC, step)

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
