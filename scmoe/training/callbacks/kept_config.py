"""Keeps in every checkpoint the configuration with which its weights were trained."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from scmoe.config.as_yaml import to_yaml
from scmoe.config.fields import Config


class KeptConfig(Callback):
    """Puts the run's configuration into every checkpoint, so that its weights are never read with
    other settings.

    config: without keys and passwords.
    """

    def __init__(self, config: Config) -> None:
        self.text = to_yaml(config)

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text
