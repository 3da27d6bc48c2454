"""What a run does with all of its loggers together: name them, hand them the best checkpoint, close them."""

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger

from scmoe.training.run.wandb_logger import SteadyWandbLogger


def describe(logger: Logger) -> str:
    if isinstance(logger, WandbLogger):
        return f"Weights & Biases, {'offline' if logger.experiment.offline else 'online'}"
    return "metrics.csv"


def log_best_checkpoint(loggers: Sequence[Logger], callbacks: Iterable[object]) -> None:
    """Hand the best checkpoint with its step and metric to W&B, where there is one and W&B is on."""
    best = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path]
    for logger, callback in product(loggers, best):
        if isinstance(logger, SteadyWandbLogger):
            assert callback.best_model_score is not None
            value = callback.best_model_score.item()
            logger.log_checkpoint(Path(callback.best_model_path), str(callback.monitor), value)


def close_loggers(loggers: Sequence[Logger], status: str = "success") -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, SteadyWandbLogger):
            logger.close(status)
