"""What a run keeps and prints of its progress: position in the data, configuration, log lines, skipped images."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from scmoe.config.fields import Config
from scmoe.config.load import to_yaml
from scmoe.training.files import redacted


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


class DataPosition(Callback):
    """Advances the datamodule's position after each batch, so that every checkpoint knows its position in the data."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]


class KeptConfig(Callback):
    """Puts the run's configuration into every checkpoint, so that its weights are never read with other settings."""

    def __init__(self, config: Config) -> None:
        self.text = to_yaml(redacted(config))

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text


class LogLines(Callback):
    """Prints the values of the progress bar as lines, for job logs and pipes: one for a logged step, one for a
    validation. They go to standard error of rank 0."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer, batch_idx) and trainer.is_global_zero:
            say(trainer, [name for name in trainer.progress_bar_metrics if not name.startswith("val/")])

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            say(trainer, [name for name in trainer.progress_bar_metrics if name.startswith("val/")])


def say(trainer: Trainer, names: Sequence[str]) -> None:
    shown = trainer.progress_bar_metrics
    values = "  ".join(f"{name} {float(shown[name]):,.4g}" for name in names if name != "v_num")
    print(f"step {trainer.global_step}/{trainer.max_steps}  {values}", file=sys.stderr, flush=True)


class SkippedImages(Callback):
    """Logs data/skipped: how often a training of data.on_error=skip has met an image that cannot be read.

    `total` counts those of validations too. An image counts each time it is met.
    """

    def __init__(self) -> None:
        self.of_rank: Tensor = torch.zeros((), dtype=torch.int64)

    def total(self, module: Any) -> int:
        """Return the count of all ranks; each must call it."""
        return int(module.parallel_context.sum_over_ranks(self.of_rank))

    def count(self, batch: dict[str, Tensor]) -> None:
        skipped = batch["skipped"].sum()
        self.of_rank = self.of_rank.to(skipped.device) + skipped

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count(batch)
        if logs_now(trainer, batch_idx):
            module.log("data/skipped", float(self.total(module)))

    def on_validation_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.count(batch)
