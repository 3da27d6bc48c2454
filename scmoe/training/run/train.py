"""Trains one configuration, from its run directory to its report. Every rank calls `train`."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scmoe.config.fields import Config
from scmoe.config.rules import shortened
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.parallel.checkpoint.durable import BrokenCheckpoint
from scmoe.training.assembly.data import build_datamodule, check_tokenizer, prepare_data
from scmoe.training.assembly.model import build_model_on_meta, build_module, initial_weights
from scmoe.training.assembly.trainer import build_callbacks, build_trainer, seed_everything
from scmoe.training.files import warn_once, write_json
from scmoe.training.run.directory import relative
from scmoe.training.run.host_memory import keep_freed_memory
from scmoe.training.run.lifetime import open_run
from scmoe.training.run.loggers import log_best_checkpoint, log_inputs, log_results
from scmoe.training.run.machine import check_machine, is_rank_zero
from scmoe.training.run.resume import Resumed, set_aside, set_aside_later, summary_if_done
from scmoe.training.run.run_state import refuse_running
from scmoe.training.run.summary import print_summary, sample_text, say_done, summarise


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
        kind, _, path = ((config.init_from or "") if checkpoint is None else "").partition(":")
        if kind:
            initial_weights(config, build_model_on_meta(config))  # its checks, before data is prepared
        prepare_data(data)
        if kind == "scmoe" and isinstance(data, TextDataModule):
            check_tokenizer(data, Path(path))
        for text in doubts(config, data):
            warn_once(text)
    with open_run(config, overrides, run_dir, checkpoint) as (directory, loggers):
        if directory is not None:
            log_inputs(loggers, config, data.state_dict())
        if directory is not None and step is not None:
            set_aside_later(directory, step)
        module = build_module(config if checkpoint is None else replace(config, init_from=None))  # it has the weights
        trainer = build_trainer(config, build_callbacks(config, directory), loggers)
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except BrokenCheckpoint as error:  # its content; names and sizes were verified before
            if directory is not None and checkpoint is not None:
                set_aside(directory, [checkpoint])
                error.add_note("the damaged checkpoint is set aside: resume again to go on from the one before it")
            raise
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


def doubts(config: Config, data: PositionedDataModule) -> Iterator[str]:
    """Yield what a user has hardly meant, although it can be run."""
    warmup, steps = config.optim.warmup_steps, config.trainer.max_steps
    if warmup > steps and not config.trainer.fast_dev_run:
        yield f"optim.warmup_steps is {warmup} and trainer.max_steps {steps}: the rate never reaches optim.lr"
    if isinstance(data, TextDataModule) and data.tokenizer_kind == "bpe":
        found = data.tokenizer.vocab_size
        if found < data.vocab_size:
            unused = f"the last {data.vocab_size - found} rows of the embedding are never trained"
            yield f"data.vocab_size is {data.vocab_size}, but this text gives a tokenizer of {found} tokens: {unused}"


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
