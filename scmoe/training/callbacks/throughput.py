"""Measures throughput: tokens, or images, per second, and the model's FLOP/s."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from scmoe.footprint.model_cost import forward_flops, peak_tflops, training_flops
from scmoe.training.callbacks.log_lines import logs_now


class Throughput(Callback):
    """Logs time/<name>, such as time/tokens_per_s, the rate of all ranks since the last log, and what follows from it:
    time/model_tflops of one device and, where its peak is known, time/mfu.

    samples: sequences, or images, of one batch on all ranks. seq_len: tokens of a sequence, each counted; None: images
    are counted. peak: TFLOP/s of a device; None: as footprint/model_cost.py knows it. Validation and checkpoints do not
    count. `mean` is the rate of all batches but the first, which includes allocation and warm-up; None where there
    are no others.
    """

    def __init__(self, samples: int, seq_len: int | None, peak: float | None = None) -> None:
        self.name = "images_per_s" if seq_len is None else "tokens_per_s"
        self.samples, self.seq_len, self.peak = samples, seq_len, peak
        self.count = samples * (seq_len or 1)
        self.batches, self.seconds = 0, 0.0
        self.window_batches, self.window_seconds = 0, 0.0
        self.tflops = 0.0  # of one batch on one device
        self.started: float | None = None
        self.warm = False

    @property
    def mean(self) -> float | None:
        return self.count * self.batches / self.seconds if self.seconds else None

    def utilisation(self, rate: float | None) -> dict[str, float | None]:
        """Return the model's TFLOP/s of one device at this rate, and its share of the peak if that is known."""
        tflops = None if rate is None else rate / self.count * self.tflops
        return {"model_tflops": tflops} | ({} if self.peak is None else {"mfu": tflops and tflops / self.peak})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forward = forward_flops(pl_module.model, self.seq_len or 0, empty_slots=False)
        self.tflops = training_flops(forward) * self.samples / trainer.world_size / 1e12
        if self.peak is None:
            device = pl_module.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
            self.peak = peak_tflops(name, str(trainer.precision))

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
            pl_module.log_dict({f"time/{key}": value for key, value in self.utilisation(rate).items() if value})
            self.window_batches, self.window_seconds = 0, 0.0

    def on_validation_start(self, *_: Any) -> None:
        self.started = None

    def on_save_checkpoint(self, *_: Any) -> None:
        self.started = None
