"""Trains one configuration, from its run directory to its report. Every rank calls `train`."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scmoe.config.fields import Config
from scmoe.config.trial import shortened
from scmoe.datamodules.text import TextDataModule
from scmoe.training.build.data import build_datamodule, check_tokenizer, prepare_data
from scmoe.training.build.model import build_module
from scmoe.training.build.trainer import build_callbacks, build_trainer, seed_everything
from scmoe.training.run.directory import relative
from scmoe.training.run.host_memory import keep_freed_memory
from scmoe.training.run.lifetime import open_run
from scmoe.training.run.loggers import log_best_checkpoint, log_inputs, log_results
from scmoe.training.run.machine import check_machine, is_rank_zero
from scmoe.training.run.resume import Resumed, set_aside_later, summary_if_done
from scmoe.training.run.state import refuse_running
from scmoe.training.run.summary import print_summary, sample_text, say_done, summarise
from scmoe.training.run.writing import write_json


def train(config: Config, overrides: Sequence[str] = (), resumed: Resumed | None = None) -> dict[str, Any] | None:
    """Train and return the summary, which is also in the run directory; return None on ranks other than 0.

    resumed: the run to continue; None starts a new run. A run that is done is not touched.
    """
    config = shortened(config)
    run_dir, checkpoint, step = resumed or (None, None, None)
    if resumed is not None and (done := summary_if_done(resumed, config)) is not None:
        return say_done(resumed.run_dir, done, config) if is_rank_zero() else None
    if run_dir is not None and is_rank_zero():
        refuse_running(run_dir)
    hush_lightning()
    check_machine(config, is_rank_zero())
    keep_freed_memory()
    seed_everything(config)
    data = build_datamodule(config)
    if is_rank_zero():
        prepare_data(data)
        kind, _, path = (config.init_from or "").partition(":")
        if checkpoint is None and kind == "scmoe" and isinstance(data, TextDataModule):
            check_tokenizer(data, Path(path))
    with open_run(config, overrides, run_dir, checkpoint) as (directory, loggers):
        if directory is not None:
            log_inputs(loggers, config, data.state_dict())
        if directory is not None and step is not None:
            set_aside_later(directory, step)
        module = build_module(config if checkpoint is None else replace(config, init_from=None))  # it has the weights
        trainer = build_trainer(config, build_callbacks(config, directory), loggers)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        summary = summarise(trainer, module, data)
        if directory is not None:
            summary = {"run_dir": str(relative(directory)), **summary}
            write_json(directory / "summary.json", summary)
        samples = sample_text(trainer, module, data)
        if directory is not None:
            log_results(loggers, trainer.global_step, samples, directory / "analysis" / "expert_load.png")
        log_best_checkpoint(loggers, trainer.checkpoint_callbacks)
    if directory is None or not trainer.is_global_zero:
        return None
    print_summary(directory, summary, samples, config)
    return summary


def hush_lightning() -> None:
    """Silence the messages and warnings of Lightning that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # tokens come from a memory map: workers would only cost memory
        ".*dataloader is not resumable.*",  # it is: the sampler starts at the datamodule's position
        ".*recommended to use `self.log.*sync_dist=True.*",  # these values are already equal on all ranks
        ".*isinstance.treespec, LeafSpec.*",  # a deprecation in torch that only Lightning can fix
        ".*is not empty.*",  # the directories of a resumed run
        ".*number of.*batches.*logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
