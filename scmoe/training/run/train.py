"""One training from start to summary, on every rank: open the run, fit, validate, sample, report."""

from __future__ import annotations

import logging as std_logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from scmoe.config.fields import Config
from scmoe.config.load import to_yaml
from scmoe.parallel.checkpoint.durable import newest_good, verify
from scmoe.parallel.lightning_seam import rank_without_trainer
from scmoe.training.build.data import build_datamodule
from scmoe.training.build.model import build_model_on_meta, build_module
from scmoe.training.build.trainer import build_callbacks, build_loggers, build_run_dir, build_trainer, seed_everything
from scmoe.training.run import report
from scmoe.training.run.directory import without_keys, write_config
from scmoe.training.run.state import write_state
from scmoe.training.run.summary import next_commands, relative, summarise, write_samples
from scmoe.training.run.wandb_logger import close_loggers, describe, log_best_checkpoint


def train(config: Config, overrides: Sequence[str] = (), run_dir: Path | None = None) -> dict[str, Any] | None:
    """Trains and returns the summary, which is also in the run directory; None on ranks other than 0.

    run_dir: the run to go on with, from its newest checkpoint; None: a new run.
    """
    _quiet()
    seed_everything(config)
    checkpoint = newest_good(run_dir / "checkpoints") if run_dir else None
    loggers: list[Logger] = []
    status = state = "failed"
    try:
        if rank_without_trainer() == 0:
            run_dir, loggers = _open_run(config, overrides, run_dir, checkpoint)
        start = config if checkpoint is None else replace(config, init_from=None)  # the checkpoint has the weights
        module, data = build_module(start), build_datamodule(config)
        callbacks = build_callbacks(config, run_dir)
        trainer = build_trainer(config, callbacks, loggers)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        summary = summarise(trainer, module, data)
        samples = write_samples(trainer, module, data)
        if run_dir is not None:
            summary = {"run_dir": str(relative(run_dir)), **summary}
            report.write_json(run_dir / "summary.json", summary)
        log_best_checkpoint(loggers, trainer.checkpoint_callbacks)
        status, state = "success", "finished"
    except SystemExit:  # the Strategy has been asked to stop, and has saved
        state = "cut"
        if run_dir is not None:
            print(f"stopped; go on with: make resume RUN={relative(run_dir)}", flush=True)
        raise
    finally:
        close_loggers(loggers, status)
        if loggers and run_dir is not None:  # rank 0
            write_state(run_dir, state)
    if run_dir is None or not trainer.is_global_zero:
        return None
    console = report.console()
    console.print(report.summary_panel(summary, samples))
    for purpose, command in next_commands(run_dir, summary["steps"], is_text=bool(samples)).items():
        console.print(f"{purpose:12} {command}", soft_wrap=True)  # whole, to be copied
    return summary


def _open_run(
    config: Config, overrides: Sequence[str], run_dir: Path | None, checkpoint: Path | None
) -> tuple[Path, list[Logger]]:
    """Rank 0: the run's directory and loggers, and what a person wants to see before it starts."""
    console, shown = report.console(), without_keys(config)
    if run_dir is None:
        run_dir = build_run_dir(config, overrides)
    else:
        write_config(run_dir, to_yaml(shown))
    write_state(run_dir, "running")
    console.print(report.config_tree(shown, f"config of {relative(run_dir)}"))
    console.print(report.model_table(report.count_parameters(build_model_on_meta(config))))
    if checkpoint is not None:
        console.print(f"going on from {relative(checkpoint)}", soft_wrap=True)
    loggers = build_loggers(config, run_dir, resumed_step=verify(checkpoint) if checkpoint else None)
    console.print(f"metrics go to {' and to '.join(describe(logger) for logger in loggers)}")
    return run_dir, loggers


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
