"""Logs how long each stage of an optimizer step takes."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from scmoe.training.callbacks.logged_steps import logs_now

STAGES = ("forward", "backward", "update")


class StepTimes(Callback):
    """Logs time/data_ms, time/forward_ms, time/backward_ms and time/update_ms of rank 0.

    Each is the mean over the optimizer steps since the last log.

    data      host time between two batches: loading, logging; without validation and checkpoints
    forward   from the batch to the loss
    backward  from the loss to the reduced gradients
    update    clipping and the optimizer's step

    On a CPU the last three are host times. On a CUDA device they lie between events of its stream.
    Nothing waits for an event: what has not been passed when a step is logged, such as the end of
    its own update, counts at the next log.
    """

    def __init__(self) -> None:
        self.data_s = 0.0
        self.batches = 0
        self.left: float | None = None  # when the batch before this one ended
        self.marks: list[Any] = []
        self.spans: dict[str, list[tuple[Any, Any]]] = {stage: [] for stage in STAGES}

    def mark(self, device: torch.device) -> None:
        """Note the time: an event of a CUDA device's stream, or the host's clock."""
        if device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.left is not None:
            self.data_s += time.perf_counter() - self.left
            self.batches += 1
        self.marks = []
        self.mark(module.device)

    def on_before_backward(self, trainer: Trainer, module: Any, loss: Tensor) -> None:
        self.mark(loss.device)

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        self.mark(module.device)

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.mark(module.device)
        for stage, start, end in zip(STAGES, self.marks, self.marks[1:], strict=False):
            self.spans[stage].append((start, end))
        if logs_now(trainer, batch_idx):
            self.log_means(trainer, module)
        self.left = time.perf_counter()

    def log_means(self, trainer: Trainer, module: Any) -> None:
        """Log the mean times, then begin again."""
        per_step = 1e3 * trainer.accumulate_grad_batches  # batches in a step, seconds in ms
        means_ms = {}
        if self.batches:
            means_ms["data"] = per_step * self.data_s / self.batches
        self.data_s = 0.0
        self.batches = 0
        for stage, spans in self.spans.items():
            ended = [passed(end) for _, end in spans]  # asked once: an event may pass at any moment
            seconds = [
                seconds_between(*span) for span, has in zip(spans, ended, strict=True) if has
            ]
            self.spans[stage] = [span for span, has in zip(spans, ended, strict=True) if not has]
            if seconds:
                means_ms[stage] = per_step * sum(seconds) / len(seconds)
        module.log_dict({f"time/{stage}_ms": value for stage, value in means_ms.items()})

    def on_validation_start(self, *_: Any) -> None:
        self.left = None

    def on_save_checkpoint(self, *_: Any) -> None:
        self.left = None


def passed(mark: Any) -> bool:
    """Return whether the device has reached an event. A time of the host always has."""
    return isinstance(mark, float) or mark.query()


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two events, or two times of the host."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
