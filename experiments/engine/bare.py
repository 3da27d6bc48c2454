"""Trains a configuration without anything around it: no run directory, loggers, checkpoints or validation.

Neither wandb nor OmegaConf is imported, so it runs where only torch and Lightning are installed.
"""

from typing import Any

from lightning.pytorch import Callback, Trainer

from scmoe.config.fields import Config
from scmoe.config.rules import resolve_ep_size
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.assembly.model import build_module


class Losses(Callback):
    """Keeps the loss of every step on the device, so that nothing waits for it."""

    def __init__(self) -> None:
        self.losses: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())


def train_bare(config: Config) -> list[float]:
    """Return the loss of every step, with the balance losses, in nats per token. ConfigError: the data cannot be used.

    It reads the config's model, moe, data, optim, `strategy.ep_size` and, of its trainer, accelerator, devices,
    precision and steps.
    """
    losses, data = Losses(), build_datamodule(config)
    prepare_data(data)
    trainer = Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        strategy=ExpertParallelStrategy(resolve_ep_size(config)),
        precision=config.trainer.precision,
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[losses],
    )
    trainer.fit(build_module(config), data)
    return [loss.item() for loss in losses.losses]
