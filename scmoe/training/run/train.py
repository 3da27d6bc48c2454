"""Runs one training, from its checks to its summary. Every rank calls `train`."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scmoe.config.derived import last_step, max_steps, shortened
from scmoe.config.fields import Config
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.files import warn_once
from scmoe.parallel.dense.memory import RankJob
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.assembly.model import build_model_on_meta, build_module, initial_weights
from scmoe.training.assembly.rank_job import dense_estimates, rank_job
from scmoe.training.assembly.trainer import build_callbacks, build_trainer, seed_everything
from scmoe.training.callbacks.kept_config import KeptConfig
from scmoe.training.run.directory import refuse_running
from scmoe.training.run.machine import check_machine, is_rank_zero, keep_freed_memory
from scmoe.training.run.output import open_output, say_done
from scmoe.training.run.resume import Resumed, summary_if_done
from scmoe.training.run.samples import sample_text
from scmoe.training.run.summary import summarise
from scmoe.training.run.wandb_logger import check_wandb


def train(
    config: Config,
    overrides: Sequence[str] = (),
    resumed: Resumed | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Train and return the summary, which is also in the run directory; return None on ranks other
    than 0.

    overrides: the words of the command, for the directory's name. resumed: the run to continue;
    None starts a new run. A run that is done is not touched. quiet: print neither the config nor
    the summary, for example where the run directory is temporary.
    """
    config = shortened(config)
    is_first = is_rank_zero()
    if resumed is not None:
        if (done := summary_if_done(resumed, last_step(config))) is not None:
            return say_done(resumed.run_dir, done, config) if is_first else None
        if is_first:
            refuse_running(resumed.run_dir)

    silence_lightning()
    keep_freed_memory()
    model, job = checked_model(config)
    # A checkpoint has its own weights.
    to_build = config if resumed is None else replace(config, init_from=None)
    seed_everything(config.seed)
    data = build_datamodule(config)
    if is_first:
        prepare(to_build, model, data)

    with open_output(config, model, overrides, resumed, quiet) as output:
        output.log_inputs(data)
        module = build_module(to_build)
        callbacks = [KeptConfig(output.public), *build_callbacks(config, output.directory)]
        estimates = dense_estimates(job, model)
        trainer = build_trainer(config, callbacks, output.loggers, estimates)
        trainer.fit(module, data, ckpt_path=resumed and resumed.checkpoint, weights_only=True)
        summary = output.keep_summary(summarise(trainer, module, data))
        samples = sample_text(trainer, module, data)
        output.log_results(trainer, summary, samples)

    if not trainer.is_global_zero:
        return None
    output.print_summary(trainer, summary, samples)
    return summary


def checked_model(config: Config) -> tuple[Any, RankJob]:
    """Return the whole network on the meta device, and the job of each rank, where this machine can
    train it. ConfigError: it cannot, or an extension's network cannot be used."""
    check_wandb(config, needs_key=is_rank_zero())
    model = build_model_on_meta(config)
    job = rank_job(config)
    check_machine(config, model, job)
    return model, job


def prepare(config: Config, model: Any, data: PositionedDataModule) -> None:
    """Check the initial weights and prepare the data, before other ranks are started. ConfigError:
    they cannot be used."""
    kind, _, path = (config.init_from or "").partition(":")
    if kind:
        initial_weights(config, model)  # its checks, before data is prepared
    prepare_data(data, Path(path) if kind else None)
    for text in doubts(config, data):
        warn_once(text)


def doubts(config: Config, data: PositionedDataModule) -> Iterator[str]:
    """Yield a warning for each setting that runs but is probably a mistake."""
    warmup = config.optim.warmup_steps
    steps = max_steps(config)
    if warmup > steps and not config.trainer.fast_dev_run:
        yield (
            f"optim.warmup_steps is {warmup} and the run has {steps} steps: the rate never"
            " reaches optim.lr"
        )
    if isinstance(data, TextDataModule) and data.tokenizer_kind == "bpe":
        num_tokens = data.tokenizer.vocab_size
        if num_tokens < data.vocab_size:
            yield (
                f"data.vocab_size is {data.vocab_size}, but this text gives a tokenizer of"
                f" {num_tokens} tokens: the last {data.vocab_size - num_tokens} rows of the"
                " embedding are never trained"
            )


def silence_lightning() -> None:
    """Silence the messages and warnings of Lightning that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        # Tokens come from a memory map: workers would only cost memory.
        ".*does not have many workers.*",
        # It is resumable: the sampler starts at the datamodule's position.
        ".*dataloader is not resumable.*",
        # These values are already equal on all ranks.
        ".*recommended to use `self.log.*sync_dist=True.*",
        # A deprecation in torch that only Lightning can fix.
        ".*isinstance.treespec, LeafSpec.*",
        # The directories of a resumed run.
        ".*is not empty.*",
        ".*number of.*batches.*logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
