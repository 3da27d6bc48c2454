"""What a run shows while it goes: tokens per second, expert load, a line a while; and its position in the data."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scmoe.moe.balance import load_metrics
from scmoe.training.collapse import CollapseAlarm


class DataPosition(Callback):
    """Tells the datamodule that a batch is done, so that every checkpoint knows where in the data it stands."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]


class LoggedStep(Callback):
    """Rows are logged under the step that they are of, counted from 0, in a resumed run too: Lightning counts one too
    many after a stop between two batches."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class Throughput(Callback):
    """time/<name>, such as tokens_per_s: of all ranks together since the last log, validation and checkpoints left out.

    count: tokens, or images, of one batch. `mean` is the rate of all batches but the first, which pays for allocation
    and warm-up.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.batches, self.seconds = 0, 0.0
        self.window_batches, self.window_seconds = 0, 0.0
        self.started: float | None = None
        self.warm = False

    @property
    def mean(self) -> float:
        return self.count * self.batches / self.seconds if self.seconds else float("nan")

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


class ExpertLoad(Callback):
    """moe/load_max, moe/load_entropy, moe/dead_experts, moe/drop_share over the batches since the last log; a warning
    where a router has collapsed."""

    def __init__(self) -> None:
        self.sums_LE2: Tensor | None = None
        self.alarm = CollapseAlarm()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sums_LE2 = outputs["load_sums_LE2"]
        if sums_LE2 is None:
            return
        self.sums_LE2 = sums_LE2 if self.sums_LE2 is None else self.sums_LE2 + sums_LE2
        if logs_now(trainer, batch_idx):
            load = load_metrics(self.sums_LE2)
            pl_module.log_dict({f"moe/{name}": value.float() for name, value in load.items()})
            for line in self.alarm(self.sums_LE2):
                rank_zero_warn(line)
            self.sums_LE2 = None


class Threads(Callback):
    """CPU threads of this process. A callback, since Lightning's launcher sets a number of its own at the start."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    def setup(self, *_: Any, **__: Any) -> None:
        torch.set_num_threads(self.num_threads)


class StepProgressBar(RichProgressBar):
    """Lightning's, named for what it counts: a training is one long epoch of steps here."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class LogLines(Callback):
    """A line per logged step on standard error, for where no terminal shows the progress bar: job logs, pipes."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx) and trainer.is_global_zero:
            shown = trainer.progress_bar_metrics
            values = "  ".join(f"{name} {float(value):,.4g}" for name, value in shown.items() if name != "v_num")
            print(f"step {trainer.global_step}/{trainer.max_steps}  {values}", file=sys.stderr, flush=True)


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """At the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
