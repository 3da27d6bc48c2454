"""One training from start to summary, on every rank: open the run, fit, validate, sample, report."""

from __future__ import annotations

import logging as std_logging
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.positioned import PositionedDataModule
from datamodules.sequences import SequenceDataModule
from datamodules.text import TextDataModule
from scmoe.config import Config, to_yaml
from scmoe.models.gpt import generate
from scmoe.parallel.durable import newest_good, verify
from scmoe.training import build, logging, report
from scmoe.training.base import MoEModule
from scmoe.training.build_model import build_model_on_meta
from scmoe.training.callbacks import Throughput
from scmoe.training.run_state import write_state

SAMPLES, SAMPLE_TOKENS = 3, 40


def train(config: Config, overrides: Sequence[str] = (), run_dir: Path | None = None) -> dict[str, Any] | None:
    """Trains and returns the summary, which is also in the run directory; None on ranks other than 0.

    run_dir: the run to go on with, from its newest checkpoint; None: a new run.
    """
    _quiet()
    build.seed_everything(config)
    checkpoint = newest_good(run_dir / "checkpoints") if run_dir else None
    loggers: list[Logger] = []
    status = state = "failed"
    try:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            run_dir, loggers = _open_run(config, overrides, run_dir, checkpoint)
        start = config if checkpoint is None else replace(config, init_from=None)  # the checkpoint has the weights
        module, data = build.build_module(start), build.build_datamodule(config)
        callbacks = build.build_callbacks(config, run_dir)
        trainer = build.build_trainer(config, callbacks, loggers)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        summary = _summary(trainer, module, data)
        samples = _samples(trainer, module, data)
        if run_dir is not None:
            summary = {"run_dir": str(_relative(run_dir)), **summary}
            report.write_json(run_dir / "summary.json", summary)
        logging.log_best_checkpoint(loggers, trainer.checkpoint_callbacks)
        status, state = "success", "finished"
    except SystemExit:  # the Strategy has been asked to stop, and has saved
        state = "cut"
        if run_dir is not None:
            print(f"stopped; go on with: make resume RUN={_relative(run_dir)}", flush=True)
        raise
    finally:
        logging.close_loggers(loggers, status)
        if loggers and run_dir is not None:  # rank 0
            write_state(run_dir, state)
    if run_dir is None or not trainer.is_global_zero:
        return None
    console = report.console()
    console.print(report.summary_panel(summary, samples))
    for purpose, command in _commands(run_dir, summary["steps"], is_text=bool(samples)).items():
        console.print(f"{purpose:12} {command}", soft_wrap=True)  # whole, to be copied
    return summary


def _open_run(
    config: Config, overrides: Sequence[str], run_dir: Path | None, checkpoint: Path | None
) -> tuple[Path, list[Logger]]:
    """Rank 0: the run's directory and loggers, and what a person wants to see before it starts."""
    console, shown = report.console(), logging.without_keys(config)
    if run_dir is None:
        run_dir = build.build_run_dir(config, overrides)
    else:
        logging.write_config(run_dir, to_yaml(shown))
    write_state(run_dir, "running")
    console.print(report.config_tree(shown, f"config of {_relative(run_dir)}"))
    console.print(report.model_table(report.count_parameters(build_model_on_meta(config))))
    if checkpoint is not None:
        console.print(f"going on from {_relative(checkpoint)}", soft_wrap=True)
    loggers = build.build_loggers(config, run_dir, resumed_step=verify(checkpoint) if checkpoint else None)
    console.print(f"metrics go to {' and to '.join(logging.describe(logger) for logger in loggers)}")
    return run_dir, loggers


def _summary(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> dict[str, Any]:
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


def _samples(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> list[str]:
    """A few lines that the model writes; every rank takes part, since the experts are spread over them."""
    if not isinstance(data, TextDataModule):
        return []
    device = trainer.strategy.root_device
    model = module.to(device).eval().model
    start = torch.full((SAMPLES, 1), data.end_of_text, device=device)
    with torch.inference_mode():
        ids = generate(model, start, SAMPLE_TOKENS)
    return [data.decode(row[1:].tolist()) for row in ids]


def _commands(run_dir: Path, steps: int, is_text: bool) -> dict[str, str]:
    """What can be typed next, whole: resuming goes on to twice the steps."""
    run = _relative(run_dir)
    commands = {"resume": f"make resume RUN={run} ARGS=trainer.max_steps={2 * steps}"}
    if is_text:
        commands["sample"] = f"make sample RUN={run}"
    if sync := logging.sync_command(run):
        commands["sync to W&B"] = f"{_relative(Path(sys.executable).parent)}/{sync}"
    return commands


def _relative(path: Path) -> Path:
    """As a person in this folder would type it."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _quiet() -> None:
    """What Lightning says that is of no use here."""
    std_logging.getLogger("lightning.pytorch").setLevel(std_logging.WARNING)
    std_logging.getLogger("lightning.fabric").setLevel(std_logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # tokens come from a memory map: workers would only cost memory
        ".*dataloader is not resumable.*",  # it is: the sampler begins at the datamodule's position
        ".*recommended to use `self.log.*sync_dist=True.*",  # these values are the same on every rank already
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own affair with torch
        ".*is not empty.*",  # a resumed run's checkpoints
        ".*the total number of batches.*logging interval.*",
        ".*number of training batches.*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
