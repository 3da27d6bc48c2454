"""Where the time of a step goes: waiting for data, forward, backward, update."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from scmoe.training.callbacks.log_lines import logs_now

STAGES = ("forward", "backward", "update")


class StepTimes(Callback):
    """Logs time/data_ms, time/forward_ms, time/backward_ms and time/update_ms: of rank 0, means over the optimizer
    steps since the last log.

    data      host time between two batches: loading, logging; without validation and checkpoints
    forward   from the batch to the loss; backward: from the loss to the reduced gradients; update: clipping, AdamW

    On a CPU the last three are host times. On a CUDA device they lie between events of its stream. Nothing waits for
    an event: what has not been passed when a step is logged, such as the end of its own update, counts at the next log.
    """

    def __init__(self) -> None:
        self.data_s, self.batches = 0.0, 0
        self.left: float | None = None  # when the batch before this one ended
        self.marks: list[Any] = []
        self.spans: dict[str, list[tuple[Any, Any]]] = {stage: [] for stage in STAGES}

    def mark(self, device: torch.device) -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.left is not None:
            self.data_s, self.batches = self.data_s + time.perf_counter() - self.left, self.batches + 1
        self.marks = []
        self.mark(pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.mark(loss.device)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mark(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.mark(pl_module.device)
        for stage, *span in zip(STAGES, self.marks, self.marks[1:], strict=False):
            self.spans[stage].append((span[0], span[1]))
        if logs_now(trainer, batch_idx):
            self.log_means(trainer, pl_module)
        self.left = time.perf_counter()

    def log_means(self, trainer: Trainer, pl_module: LightningModule) -> None:
        per_step = 1e3 * trainer.accumulate_grad_batches  # batches in a step, seconds in ms
        found = {"data": per_step * self.data_s / self.batches} if self.batches else {}
        self.data_s, self.batches = 0.0, 0
        for stage, spans in self.spans.items():
            seconds = [seconds_between(*span) for span in spans if passed(span[1])]
            self.spans[stage] = [span for span in spans if not passed(span[1])]
            if seconds:
                found[stage] = per_step * sum(seconds) / len(seconds)
        pl_module.log_dict({f"time/{stage}_ms": value for stage, value in found.items()})

    def on_validation_start(self, *_: Any) -> None:
        self.left = None

    def on_save_checkpoint(self, *_: Any) -> None:
        self.left = None


def passed(mark: Any) -> bool:
    """Return whether the device has reached an event. A time of the host has passed."""
    return isinstance(mark, float) or mark.query()


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
