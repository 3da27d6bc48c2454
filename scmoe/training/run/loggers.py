"""The loggers of a run: the one of metrics.csv, W&B's unless it is disabled, TensorBoard's if it is wanted."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from scmoe.config.extras import install_command
from scmoe.config.fields import Config
from scmoe.training.redact import redacted
from scmoe.training.run.csv_logger import csv_logger
from scmoe.training.run.tensorboard_logger import SteadyTensorBoardLogger, tensorboard_logger
from scmoe.training.run.wandb_logger import HAS_WANDB, SteadyWandbLogger, wandb_logger, wandb_mode


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
    if isinstance(logger, SteadyWandbLogger):
        return f"Weights & Biases, {'offline' if logger.experiment.offline else 'online'}"
    return "TensorBoard" if isinstance(logger, SteadyTensorBoardLogger) else "metrics.csv"


def log_results(loggers: Sequence[Logger], step: int, samples: Sequence[str], load: Path) -> None:
    """Hand W&B what a run has at its end: the texts that its model has written, and the heat map of its experts."""
    for logger in loggers:
        if isinstance(logger, SteadyWandbLogger):
            import wandb  # here, as it is an extra

            if samples:
                logger.log_at_the_end(
                    "samples", wandb.Table(["step", "text"], [[step, text] for text in samples]), step
                )
            if load.exists():
                logger.log_at_the_end("moe/expert_load", wandb.Image(str(load)), step)


def log_inputs(loggers: Sequence[Logger], config: Config, state: Mapping[str, Any]) -> None:
    """Tell W&B which data set and tokenizer a training reads, by names and hashes. state: of the datamodule."""
    data = redacted(config.data)
    name = str(data.path) if data.name == "hf" else data.name
    inputs = {"dataset": (name, {"name": name, "subset": data.subset, "content": state.get("data")})}
    if "tokenizer" in state:
        name = data.tokenizer if data.tokenizer in ("bpe", "gpt2") else Path(data.tokenizer).name
        inputs["tokenizer"] = (name, {"name": name, "content": state["tokenizer"]})
    for logger in loggers:
        if isinstance(logger, SteadyWandbLogger):
            for kind, (name, facts) in inputs.items():
                logger.log_input(kind, name, facts)


def log_best_checkpoint(loggers: Sequence[Logger], callbacks: Iterable[object]) -> None:
    """Hand the best checkpoint with its step and metric to W&B, where there is one and W&B is on."""
    for callback in callbacks:
        # a resumed run whose directory was moved, and that has not validated since, has a path and no score
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            value = callback.best_model_score.item()
            for logger in loggers:
                if isinstance(logger, SteadyWandbLogger):
                    logger.log_checkpoint(Path(callback.best_model_path), callback.monitor, value)


def close_loggers(loggers: Sequence[Logger], status: str = "success") -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, SteadyWandbLogger):
            logger.close(status)
