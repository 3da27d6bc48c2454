"""What a run measures of its steps: their times, throughput, memory, norms of gradients, and traces
of some steps; and what it keeps and prints of its progress: position in the data, configuration,
log lines, skipped images.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from scmoe.config.fields import Config
from scmoe.config.leaves import four_digits
from scmoe.config.load import to_yaml
from scmoe.estimate.model_cost import forward_flops, parts, peak_tflops, training_flops
from scmoe.files.writing import redacted, try_to_write
from scmoe.lightning.seam import shown_metrics
from scmoe.parallel.dense import GIB
from scmoe.parallel.mesh import expert_parameters
from scmoe.parallel.update.guard import squares


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


class DataPosition(Callback):
    """Advances the datamodule's position after each batch, so that every checkpoint knows its
    position in the data."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]


class KeptConfig(Callback):
    """Puts the run's configuration into every checkpoint, so that its weights are never read with
    other settings."""

    def __init__(self, config: Config) -> None:
        self.text = to_yaml(redacted(config))

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text


class LogLines(Callback):
    """Prints the values of the progress bar as lines, for job logs and pipes: one for a logged
    step, one for a validation. They go to standard error of rank 0."""

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx) and trainer.is_global_zero:
            say(trainer, lambda name: not name.startswith("val/"))

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            say(trainer, lambda name: name.startswith("val/"))


def say(trainer: Trainer, wanted: Callable[[str], bool]) -> None:
    metrics = {name: float(value) for name, value in shown_metrics(trainer).items() if wanted(name)}
    values = "  ".join(f"{name} {four_digits(value)}" for name, value in metrics.items())
    print(f"step {trainer.global_step}/{trainer.max_steps}  {values}", file=sys.stderr, flush=True)


class SkippedImages(Callback):
    """Logs data/skipped: how often a training of data.on_error=skip has met an image that cannot be
    read.

    `total` counts those of validations too. An image counts each time it is met. Checkpoints keep
    the count.
    """

    def __init__(self) -> None:
        self.of_rank: Tensor = torch.zeros((), dtype=torch.int64)

    def total(self, module: Any) -> int:
        """Return the count of all ranks; each must call it."""
        return int(module.parallel_context.sum_over_ranks(self.of_rank))

    def count(self, batch: dict[str, Tensor]) -> None:
        skipped = batch["skipped"].sum()
        self.of_rank = self.of_rank.to(skipped.device) + skipped

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count(batch)
        if logs_now(trainer, batch_idx):
            module.log("data/skipped", float(self.total(module)))

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.count(batch)

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        own = self.of_rank.to(trainer.strategy.root_device, copy=True)  # reduce writes into it
        checkpoint["skipped_images"] = int(trainer.strategy.reduce(own, reduce_op="sum"))

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        self.of_rank = torch.tensor(
            checkpoint.get("skipped_images", 0) if trainer.is_global_zero else 0
        )


STAGES = ("forward", "backward", "update")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class StepTimes(Callback):
    """Logs time/data_ms, time/forward_ms, time/backward_ms and time/update_ms: of rank 0, means
    over the optimizer steps since the last log.

    data      host time between two batches: loading, logging; without validation and checkpoints
    forward   from the batch to the loss; backward: from the loss to the reduced gradients; update:
              clipping, AdamW

    On a CPU the last three are host times. On a CUDA device they lie between events of its stream.
    Nothing waits for an event: what has not been passed when a step is logged, such as the end of
    its own update, counts at the next log.
    """

    def __init__(self) -> None:
        self.data_s, self.batches = 0.0, 0
        self.left: float | None = None  # when the batch before this one ended
        self.marks: list[Any] = []
        self.spans: dict[str, list[tuple[Any, Any]]] = {stage: [] for stage in STAGES}

    def mark(self, device: torch.device) -> None:
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
        per_step = 1e3 * trainer.accumulate_grad_batches  # batches in a step, seconds in ms
        found = {"data": per_step * self.data_s / self.batches} if self.batches else {}
        self.data_s, self.batches = 0.0, 0
        for stage, spans in self.spans.items():
            ended = [passed(end) for _, end in spans]  # asked once: an event may pass at any moment
            seconds = [
                seconds_between(*span) for span, has in zip(spans, ended, strict=True) if has
            ]
            self.spans[stage] = [span for span, has in zip(spans, ended, strict=True) if not has]
            if seconds:
                found[stage] = per_step * sum(seconds) / len(seconds)
        module.log_dict({f"time/{stage}_ms": value for stage, value in found.items()})

    def on_validation_start(self, *_: Any) -> None:
        self.left = None

    def on_save_checkpoint(self, *_: Any) -> None:
        self.left = None


def passed(mark: Any) -> bool:
    """Return whether the device has reached an event. A time of the host has passed."""
    return isinstance(mark, float) or mark.query()


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3


class Throughput(Callback):
    """Logs time/tokens_per_s or time/images_per_s, the rate of all ranks since the last log without
    validation and checkpoints; time/model_tflops of one device and, where its peak is known,
    time/mfu.

    samples: sequences, or images, of one batch on all ranks. seq_len: tokens of a sequence; None:
    images are counted. peak: TFLOP/s of a device; None: as estimate/model_cost.py knows it. `mean`
    is the rate of all batches but the first, which includes allocation and warm-up; None where
    there are no others.
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
        """Return the model's TFLOP/s of one device at this rate, and its share of the peak if that
        is known."""
        tflops = None if rate is None else rate / self.count * self.tflops
        share = {} if self.peak is None else {"mfu": tflops and tflops / self.peak}
        return {"model_tflops": tflops, **share}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        forward = forward_flops(module.model, self.seq_len or 0, empty_slots=False)
        self.tflops = training_flops(forward) * self.samples / trainer.world_size / 1e12
        if self.peak is None:
            name = (
                torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else None
            )
            self.peak = peak_tflops(name, str(trainer.precision))

    def on_train_batch_start(self, *_: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.started is not None
        now = time.perf_counter()
        if self.warm:
            self.batches += 1
            self.seconds += now - self.started
        self.window_batches += 1
        self.window_seconds += now - self.started
        self.started, self.warm = now, True
        if logs_now(trainer, batch_idx):
            rate = self.count * self.window_batches / self.window_seconds
            module.log(
                f"time/{self.name}", torch.tensor(rate, device="cpu"), prog_bar=True
            )  # read after every batch
            module.log_dict(
                {f"time/{key}": value for key, value in self.utilisation(rate).items() if value}
            )
            self.window_batches, self.window_seconds = 0, 0.0

    def on_validation_start(self, *_: Any) -> None:
        self.started = None

    def on_save_checkpoint(self, *_: Any) -> None:
        self.started = None


class Memory(Callback):
    """Logs memory/host_gib, and memory/device_gib on GPUs: the peak since the start, of the rank
    that has held most.

    host: resident pages of the process, those of its libraries included. device: what torch has
    allocated; NCCL's own buffers are not in it. `most` has both at the end of the training; it is
    empty if there was none.
    """

    def __init__(self) -> None:
        self.most: dict[str, float] = {}

    def peaks(self, module: Any) -> dict[str, Tensor]:
        """Return both in GiB, on the device: nothing waits for it. Every rank must call it."""
        context = module.parallel_context
        own = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB}
        if module.device.type == "cuda":
            own["device_gib"] = torch.cuda.max_memory_allocated(module.device) / GIB
        of_ranks = torch.zeros(
            len(own), context.world_size, dtype=torch.float64, device=module.device
        )
        for row, value in zip(of_ranks, own.values(), strict=True):
            row[context.rank] = value
        return dict(zip(own, context.sum_over_ranks(of_ranks).amax(1), strict=True))

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer, batch_idx):
            module.log_dict({f"memory/{name}": value for name, value in self.peaks(module).items()})

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Keep the values now: after the training the module is on the CPU, and NCCL sums nothing
        there."""
        self.most = {name: gib.item() for name, gib in self.peaks(module).items()}


class GradientNorms(Callback):
    """Logs grad_norm/<kind> of logged steps, before clipping: norms of the whole model, whatever
    ranks hold.

    Their squares add up to that of train/grad_norm. Kinds are those of the table of parameters that
    a run prints.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, list[nn.Parameter]] = {}
        self.shards: set[nn.Parameter] = set()
        self.wanted = False

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        kinds = defaultdict[str, list[nn.Parameter]](list)
        for kind, _, own in parts(module.model):
            kinds[kind.lower().replace(" ", "_")] += [
                p for p in module.model.parameters() if p in own
            ]
        self.kinds, self.shards = dict(kinds), {p for _, p in expert_parameters(module)}

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.wanted = logs_now(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.wanted:
            context = module.parallel_context
            of_kinds = [
                squares(own, self.shards, context, module.device) for own in self.kinds.values()
            ]
            parts_K, replicated_K = (torch.stack(each) for each in zip(*of_kinds, strict=True))
            norms_K = (context.sum_over_ranks(parts_K) + replicated_K).sqrt()
            module.log_dict(
                {f"grad_norm/{kind}": norm for kind, norm in zip(self.kinds, norms_K, strict=True)}
            )


class ProfileSteps(Callback):
    """Records some steps with torch.profiler, on every rank: trainer.profile_steps=10:13 records
    steps 10, 11 and 12.

        <run>/traces/steps-10-13-rank-0.json.gz    a Chrome trace: open it at
                                                   https://ui.perfetto.dev or chrome://tracing

    Operators of the MoE stream and of its backbone are named scmoe/<operator>. folder: the run
    directory on rank 0; other ranks get it from there, and it must exist for them too.
    """

    def __init__(self, steps: str, folder: Path | None) -> None:
        self.first, self.end = map(int, steps.split(":"))
        self.folder = folder
        self.running: profile | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.running is None and self.first <= trainer.global_step < self.end:
            on_gpu = [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
            self.running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self.running.start()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.end:
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Write the trace. The run may end before the last step that was asked for."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(
                module.device
            )  # so that the trace holds the kernels of the last step
        if (found := self.stop()) is not None:
            assert self.folder is not None
            path = (
                self.folder
                / "traces"
                / f"steps-{self.first}-{self.end}-rank-{trainer.global_rank}.json.gz"
            )
            try_to_write(path, lambda partial: found.export_chrome_trace(str(partial)))

    def on_exception(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> profile | None:
        found, self.running = self.running, None
        if found is not None:
            found.stop()
        return found
