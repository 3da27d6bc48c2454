"""Puts the run's configuration into every checkpoint, so that its weights are never read with other settings."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from scmoe.config.fields import Config
from scmoe.config.load import to_yaml
from scmoe.training.redact import redacted


class KeptConfig(Callback):
    def __init__(self, config: Config) -> None:
        self.text = to_yaml(redacted(config))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text
