"""The end of a run: its summary, samples of its text, and the commands that can come next."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from datamodules.positioned import PositionedDataModule
from datamodules.sequences import SequenceDataModule
from datamodules.text import TextDataModule
from scmoe.models.decoder import generate
from scmoe.training.callbacks.throughput import Throughput
from scmoe.training.moe_module import MoEModule
from scmoe.training.run import report
from scmoe.training.run.wandb_logger import sync_command

SAMPLES, SAMPLE_TOKENS = 3, 40


def summarise(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> dict[str, Any]:
    """The numbers of the run's last line, validated after the last step; every rank takes part."""
    steps = trainer.global_step
    if module.validated_step != steps:
        trainer.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    total, active = report.total_and_active(report.count_parameters(module.model))
    throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
    rate = None if math.isnan(throughput.mean) else throughput.mean
    val_loss = metrics["val/loss"]
    if isinstance(data, SequenceDataModule):
        quality: dict[str, Any] = {
            "perplexity": metrics["val/perplexity"],
            "bits_per_byte": metrics["val/bits_per_byte"],
            "unigram_bits_per_byte": data.unigram_bits_per_byte(),
            "tokens_per_s": rate,
        }
        of_images: dict[str, Any] = {}
    else:  # the same keys: a class stands for a token, a picture has no bytes of text, and its tokens are its patches
        patches = module.model.patches.num_patches
        quality = {
            "perplexity": torch.tensor(val_loss).exp().item(),  # inf, not an error, where the loss is huge
            "bits_per_byte": None,
            "unigram_bits_per_byte": None,
            "tokens_per_s": None if rate is None else rate * patches,
        }
        # data: what was asked for, since nothing stands in for it
        of_images = {"val_accuracy": metrics["val/accuracy"], "data": data.name, "images_per_s": rate}
    return {
        "val_loss": val_loss,
        **quality,
        "steps": steps,
        "params_total": total,
        "params_active": active,
        "ep_size": module.parallel_context.ep_size,
        "world_size": trainer.world_size,
        "drop_share": metrics.get("val/drop_share"),
        "load_max_ratio": metrics.get("val/load_max"),
        **of_images,
    }


def write_samples(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> list[str]:
    """A few lines that the model writes; every rank takes part, since the experts are spread over them."""
    if not isinstance(data, TextDataModule):
        return []
    device = trainer.strategy.root_device
    model = module.to(device).eval().model
    start = torch.full((SAMPLES, 1), data.end_of_text, device=device)
    with torch.inference_mode():
        ids = generate(model, start, SAMPLE_TOKENS)
    return [data.decode(row[1:].tolist()) for row in ids]


def next_commands(run_dir: Path, steps: int, is_text: bool) -> dict[str, str]:
    """What can be typed next, whole: resuming goes on to twice the steps."""
    run = relative(run_dir)
    commands = {"resume": f"make resume RUN={run} ARGS=trainer.max_steps={2 * steps}"}
    if is_text:
        commands["sample"] = f"make sample RUN={run}"
    if sync := sync_command(run):
        commands["sync to W&B"] = f"{relative(Path(sys.executable).parent)}/{sync}"
    return commands


def relative(path: Path) -> Path:
    """As a person in this folder would type it."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
