"""Logs tokens or images per second, and the share of a device's peak."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from scmoe.models.model_cost import forward_flops, peak_tflops, training_flops
from scmoe.training.callbacks.logged_steps import logs_now


class Throughput(Callback):
    """Logs train/tokens or train/images, the number so far on all ranks, with every logged step and
    validation; time/tokens_per_s or time/images_per_s, time/model_tflops and time/mfu.

    The rate is that of all ranks since the last log, without validation and checkpoints. TFLOP/s
    are those of one device; mfu is logged where the device's peak is known.

    samples: sequences, or images, of one batch on all ranks. seq_len: tokens of a sequence; None:
    images are counted. peak: TFLOP/s of a device; None: as models/model_cost.py knows it. `mean`
    is the rate of all batches but the first, which includes allocation and warm-up; None where
    there are no others.
    """

    def __init__(self, samples: int, seq_len: int | None, peak: float | None = None) -> None:
        self.unit = "images" if seq_len is None else "tokens"
        self.samples = samples
        self.seq_len = seq_len
        self.peak = peak
        self.count = samples * (seq_len or 1)
        self.batches = 0
        self.seconds = 0.0
        self.window_batches = 0  # since the last log
        self.window_seconds = 0.0
        self.tflops = 0.0  # of one batch on one device
        self.started: float | None = None
        self.in_batch = False
        self.warm = False

    @property
    def mean(self) -> float | None:
        return self.count * self.batches / self.seconds if self.seconds else None

    @property
    def batches_here(self) -> int:
        """The batches that this process has trained."""
        return self.batches + int(self.warm)

    def utilisation(self, rate: float | None) -> dict[str, float | None]:
        """Return the model's TFLOP/s of one device at this rate, and its share of the peak if that
        is known."""
        tflops = None if rate is None else rate / self.count * self.tflops
        share = {} if self.peak is None else {"mfu": tflops and tflops / self.peak}
        return {"model_tflops": tflops, **share}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        forward = forward_flops(module.model, self.seq_len or 0, empty_slots=False)
        self.tflops = training_flops(forward) * self.samples / trainer.world_size / 1e12
        if self.peak is None:
            on_gpu = module.device.type == "cuda"
            name = torch.cuda.get_device_name(module.device) if on_gpu else None
            self.peak = peak_tflops(name, str(trainer.precision))

    def on_train_batch_start(self, *_: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()
        self.in_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.started is not None
        ended = time.perf_counter()
        if self.warm:
            self.batches += 1
            self.seconds += ended - self.started
        self.window_batches += 1
        self.window_seconds += ended - self.started
        self.started = ended
        self.in_batch = False
        self.warm = True
        if logs_now(trainer, batch_idx):
            self.log_amount(trainer, module)
            rate = self.count * self.window_batches / self.window_seconds
            # the progress bar reads it after every batch
            on_host = torch.tensor(rate, device="cpu")
            module.log(f"time/{self.unit}_per_s", on_host, prog_bar=True)
            module.log_dict(
                {f"time/{key}": value for key, value in self.utilisation(rate).items() if value}
            )
            self.window_batches = 0
            self.window_seconds = 0.0

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self.log_amount(trainer, module)

    def log_amount(self, trainer: Trainer, module: Any) -> None:
        """Log what all steps so far have read."""
        amount = trainer.global_step * trainer.accumulate_grad_batches * self.count
        # as a tensor of the host, like the rate; float32 would round 17 million
        exact = torch.tensor(amount, dtype=torch.float64, device="cpu")
        module.log(f"train/{self.unit}", exact)

    def on_validation_start(self, *_: Any) -> None:
        self.started = None

    def on_save_checkpoint(self, *_: Any) -> None:
        """Leave out the time of a save, unless a user's callback saves inside a batch."""
        if not self.in_batch:
            self.started = None
