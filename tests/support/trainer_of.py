"""The Trainer of a configuration, with the callbacks and loggers of a test."""

from collections.abc import Sequence

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from scmoe.config.fields import Config
from scmoe.training.assembly.trainer import build_trainer


def trainer_of(config: Config, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer:
    """Return the Trainer. Its Strategy has no estimates of a rank's memory."""
    return build_trainer(config, callbacks, loggers)
