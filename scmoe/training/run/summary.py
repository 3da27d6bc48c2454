"""The summary of a run: its numbers, which summary.json keeps, and the panel that shows them."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.lightning.seam.loops import count_steps_from
from scmoe.models.model_cost import count_parameters, total_and_active
from scmoe.training.callbacks.peak_memory import PeakMemory
from scmoe.training.callbacks.skipped_images import SkippedImages
from scmoe.training.callbacks.throughput import Throughput
from scmoe.training.modules import MoEModule

# Of the steps since the last log.
LOADS = ("step_load_max", "rank_load_max", "step_drop", "dead_experts")


def summarise(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> dict[str, Any]:
    """Return the numbers of the summary. It validates first if the last step was not validated.
    Every rank must call it.

    steps_here: steps since the last start. Values that only a validation gives are None in a run
    without one (trainer.limit_val_batches=0). The unigram's bits are those of the whole split, so
    they are None where a validation reads only a part of it.
    """
    steps = trainer.global_step
    metrics = dict(trainer.callback_metrics)  # the validation below removes them
    if module.validated_step != steps and trainer.limit_val_batches != 0:
        count_steps_from(trainer, steps - 1)  # the row of the last step; rows count from 0
        trainer.validate(module, data, verbose=False)
    metrics |= trainer.callback_metrics
    numbers = {name: float(value) for name, value in metrics.items()}
    total, active = total_and_active(count_parameters(module.model))
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    throughput = next(c for c in callbacks if isinstance(c, Throughput))
    memory = next(c for c in callbacks if isinstance(c, PeakMemory)).at_end
    rate = throughput.mean
    unigram = None
    tokens_per_sample = 0  # of an image, its patches; it has no perplexity and no bytes of text
    of_images: dict[str, Any] = {}
    if isinstance(data, SequenceDataModule):
        tokens_per_sample = 1
        limit = trainer.limit_val_batches  # a number of batches; 1.0: all
        is_part = isinstance(limit, int) and limit < len(data.val_dataloader())
        unigram = None if is_part else data.unigram_bits_per_byte()
    else:
        patches = getattr(module.model, "patches", None)
        tokens_per_sample = getattr(patches, "num_patches", 0)
        of_images["val_accuracy"] = numbers.get("val/accuracy")
        of_images["data"] = getattr(data, "name", type(data).__name__)
        of_images["images_per_s"] = rate
    skipped = sum(c.total(module) for c in callbacks if isinstance(c, SkippedImages))
    return {
        "val_loss": numbers.get("val/loss"),
        "perplexity": numbers.get("val/perplexity"),
        "bits_per_byte": numbers.get("val/bits_per_byte"),
        "unigram_bits_per_byte": unigram,
        "tokens_per_s": rate * tokens_per_sample if rate and tokens_per_sample else None,
        **throughput.utilisation(rate),
        **{f"peak_{name}": gib for name, gib in memory.items()},
        "steps": steps,
        "steps_here": throughput.batches_here // trainer.accumulate_grad_batches,
        "params_total": total,
        "params_active": active,
        "ep_size": module.wire.mesh.ep_size,
        "world_size": trainer.world_size,
        "drop_share": numbers.get("val/drop_share"),
        "load_max_ratio": numbers.get("val/load_max"),
        **{name: numbers.get(f"moe/{name}") for name in LOADS},
        "skipped": len(data.skipped) + skipped,
        **of_images,
    }


def summary_panel(summary: Mapping[str, Any], samples: list[str]) -> Panel:
    """Return the summary and the samples of a run as a panel."""
    table = Table.grid(padding=(0, 2))
    ranks = f"{summary['world_size']} rank{'s' if summary['world_size'] > 1 else ''}"
    rows = {"steps": f"{summary['steps']:,} on {ranks}, EP = {summary['ep_size']}"}
    unit = "images" if "val_accuracy" in summary else "tokens"
    if summary["val_loss"] is None:
        rows["validation"] = "none, as trainer.limit_val_batches is 0"
    elif unit == "images":
        rows["validation loss"] = f"{summary['val_loss']:.4f} nats per image"
        rows["accuracy"] = (
            f"{summary['val_accuracy']:.2%} of the validation images of {summary['data']}"
        )
    else:
        rows["validation loss"] = (
            f"{summary['val_loss']:.4f} nats per token, perplexity {summary['perplexity']:.2f}"
        )
        rows["bits per byte"] = f"{summary['bits_per_byte']:.4f}"
        if unigram := summary["unigram_bits_per_byte"]:
            rows["bits per byte"] += (
                f"; unigram {unigram:.4f}, ratio {summary['bits_per_byte'] / unigram:.3f}"
            )
    rate = summary[f"{unit}_per_s"]
    if rate:
        mfu = f", MFU {summary['mfu']:.1%}" if "mfu" in summary else ""
        rows["throughput"] = f"{rate:,.0f} {unit}/s over all ranks"
        rows["model FLOP/s"] = f"{summary['model_tflops']:.3g} TFLOP/s on each device{mfu}"
    elif summary["steps_here"]:
        rows["throughput"] = "not measured: too few steps"
    else:  # a resumed run that had done all its steps already
        rows["training"] = "no step was left to do, so nothing of the training is measured here"
    if "peak_host_gib" in summary:
        device = ""
        if "peak_device_gib" in summary:
            device = f"; {summary['peak_device_gib']:.2f} GiB of a GPU"
        rows["peak memory"] = (
            f"{summary['peak_host_gib']:.2f} GiB on the host{device}, highest rank"
        )
    if summary["load_max_ratio"] is not None:
        rows["validation load"] = (
            f"busiest expert {summary['load_max_ratio']:.2f} x the mean, in the worst layer"
        )
        rows["validation drops"] = f"{summary['drop_share']:.2%} of routed copies"
    if summary["step_load_max"] is not None:
        expert, rank = summary["step_load_max"], summary["rank_load_max"]
        rows["training load"] = (
            f"busiest expert {expert:.2f} x the mean, busiest rank {rank:.2f}, in the last steps"
        )
        if summary["step_drop"] is not None:
            rows["training drops"] = (
                f"{summary['step_drop']:.2%} of routed copies, in the last steps"
            )
    if summary["skipped"]:
        rows["skipped"] = (
            f"{summary['skipped']:,} times a file that cannot be read (data.on_error=skip)"
        )
    rows["run directory"] = str(summary["run_dir"])
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    for text in samples:
        table.add_row(
            Text("sample", style="bold"),
            Text(" ".join(text.split()), overflow="ellipsis", no_wrap=True),
        )
    return Panel(table, title="run finished", title_align="left")
