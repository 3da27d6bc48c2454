"""Measures throughput: tokens, or images, per second."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from scmoe.training.callbacks.log_lines import logs_now


class Throughput(Callback):
    """Logs time/<name>, such as time/tokens_per_s: the rate of all ranks since the last log.

    count: tokens, or images, of one batch on all ranks. Time for validation and checkpoints does not count. `mean` is
    the rate of all batches but the first, which includes allocation and warm-up; None where there are no others.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.batches, self.seconds = 0, 0.0
        self.window_batches, self.window_seconds = 0, 0.0
        self.started: float | None = None
        self.warm = False

    @property
    def mean(self) -> float | None:
        return self.count * self.batches / self.seconds if self.seconds else None

    def on_train_batch_start(self, *_: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.started is not None
        now = time.perf_counter()
        if self.warm:
            self.batches, self.seconds = self.batches + 1, self.seconds + now - self.started
        self.window_batches, self.window_seconds = self.window_batches + 1, self.window_seconds + now - self.started
        self.started, self.warm = now, True
        if logs_now(trainer, batch_idx):
            rate = self.count * self.window_batches / self.window_seconds
            pl_module.log(f"time/{self.name}", rate, prog_bar=True)
            self.window_batches, self.window_seconds = 0, 0.0

    def on_validation_start(self, *_: Any) -> None:
        self.started = None

    def on_save_checkpoint(self, *_: Any) -> None:
        self.started = None
