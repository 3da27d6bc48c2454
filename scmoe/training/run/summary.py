"""The end of a run: its summary, samples of its text, and the commands that can follow."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from scmoe.config.extras import scmoe
from scmoe.config.fields import Config
from scmoe.config.registry import words
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.inference.generate import generate
from scmoe.inference.stopping import Stopping
from scmoe.lightning.seam import count_steps_from
from scmoe.models.decoder import Decoder
from scmoe.training.callbacks.peak_memory import Memory
from scmoe.training.callbacks.skipped_images import SkippedImages
from scmoe.training.callbacks.throughput import Throughput
from scmoe.training.moe_module import MoEModule
from scmoe.training.run import printout
from scmoe.training.run.directory import relative
from scmoe.training.run.wandb_logger import sync_command

SAMPLES, SAMPLE_TOKENS = 3, 40


def summarise(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> dict[str, Any]:
    """Return the numbers of the summary, validating first if the last step was not. Every rank must call it.

    What only a validation finds is None in a run without one (trainer.limit_val_batches=0). The bits of the unigram are
    those of the whole split: None where a validation reads a part of it.
    """
    steps = trainer.global_step
    if module.validated_step != steps and trainer.limit_val_batches != 0:
        count_steps_from(trainer, steps - 1)  # the row is that of the last step, which is counted from 0
        trainer.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    total, active = printout.total_and_active(printout.count_parameters(module.model))
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    throughput = next(c for c in callbacks if isinstance(c, Throughput))
    memory = next(c for c in callbacks if isinstance(c, Memory)).most
    rate = throughput.mean
    if isinstance(data, SequenceDataModule):
        limit = trainer.limit_val_batches  # a number of batches; 1.0: all
        part = isinstance(limit, int) and limit < len(data.val_dataloader())
        unigram, tokens, of_images = None if part else data.unigram_bits_per_byte(), 1, {}
    else:  # a token of an image is a patch; it has no perplexity and no bytes of text
        unigram, tokens = None, getattr(getattr(module.model, "patches", None), "num_patches", 0)
        name = getattr(data, "name", type(data).__name__)
        of_images = {"val_accuracy": metrics.get("val/accuracy"), "data": name, "images_per_s": rate}
    return {
        "val_loss": metrics.get("val/loss"),
        "perplexity": metrics.get("val/perplexity"),
        "bits_per_byte": metrics.get("val/bits_per_byte"),
        "unigram_bits_per_byte": unigram,
        "tokens_per_s": rate * tokens if rate and tokens else None,
        **throughput.utilisation(rate),
        **{f"peak_{name}": gib for name, gib in memory.items()},
        "steps": steps,
        "params_total": total,
        "params_active": active,
        "ep_size": module.parallel_context.ep_size,
        "world_size": trainer.world_size,
        "drop_share": metrics.get("val/drop_share"),
        "load_max_ratio": metrics.get("val/load_max"),
        "skipped": len(data.skipped) + sum(c.total(module) for c in callbacks if isinstance(c, SkippedImages)),
        **of_images,
    }


def sample_text(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> list[str]:
    """Return a few short texts that the model generates; none for images. Every rank must call it: all have experts."""
    if not isinstance(data, TextDataModule) or not isinstance(module.model, Decoder) or module.model.max_seq_len < 2:
        return []
    model, end = module.to(trainer.strategy.root_device).eval().model, data.tokenizer.end_of_text
    stopping = Stopping(min(SAMPLE_TOKENS, model.max_seq_len - 1), decode=data.tokenizer.decode)
    eager = torch.compiler.set_stance("force_eager")  # torch would compile again for each length of the text
    with trainer.precision_plugin.val_step_context(), eager:
        return [stopping.text(ids) for ids, _ in generate(model, [[end]] * SAMPLES, stopping)]


def say_done(run_dir: Path, summary: dict[str, Any], config: Config) -> dict[str, Any]:
    """Say that a run has nothing left to do, and return its summary."""
    more = resume_command(run_dir, summary["steps"], config)
    print(f"nothing to do: all {summary['steps']} steps are done; for more: {more}", file=sys.stderr)
    return summary


def resume_command(run_dir: Path, steps: int, config: Config) -> str:
    """Return the command that trains further. A run that ended before its last step keeps its number of steps."""
    more = [f"trainer.max_steps={2 * steps}"] if steps >= config.trainer.max_steps else []
    if config.trainer.limit_train_batches is not None:
        more.append("trainer.limit_train_batches=null")
    return scmoe("resume", relative(run_dir), *more, *words(config.extensions, config.callbacks))


def print_summary(run_dir: Path, summary: Mapping[str, Any], samples: list[str], config: Config) -> None:
    """Print the summary's panel, and the commands that can follow, ready to copy."""
    run, console = relative(run_dir), printout.console()
    console.print(printout.summary_panel(summary, samples))
    commands = {}
    if not config.trainer.fast_dev_run:  # which cannot go on
        commands["resume"] = resume_command(run_dir, summary["steps"], config)
    if samples:
        commands["generate"] = scmoe("generate", run, *words(config.extensions, {}))
    if sync := sync_command(run):
        commands["sync to W&B"] = f"{relative(Path(sys.executable).parent)}/{sync}"
    for purpose, command in commands.items():
        console.print(f"{purpose:12} {command}", soft_wrap=True, markup=False)
