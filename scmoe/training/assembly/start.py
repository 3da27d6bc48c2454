"""What a training knows before it begins: the one value between `load` and the run.

`Start.of` makes it from the configuration. A run (run/train.py) asks it for the parts when it needs
them, because the directory, the loggers and the ranks come into being one after the other. A run
knows `Start` only as the Protocol of run/parts.py, so it does not import how models, data and
callbacks are built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from scmoe.config.derived import last_step, max_steps, shortened
from scmoe.config.fields import Config
from scmoe.config.registry import words
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.files import redacted, warn_once
from scmoe.parallel.dense.dense_auto import possible_modes
from scmoe.parallel.dense.memory import RankJob, rank_memory
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.assembly.model import (
    build_model_on_meta,
    build_module,
    initial_weights,
    updated_by_muon,
)
from scmoe.training.assembly.rank_job import rank_job
from scmoe.training.assembly.trainer import (
    build_callbacks,
    build_strategy,
    build_trainer,
    seed_everything,
)
from scmoe.training.modules import MoEModule
from scmoe.training.samples import sample_text


@dataclass(frozen=True)
class Start:
    """A configuration, what follows from it, and how its parts are made.

    config: with the short trial's settings where trainer.fast_dev_run is set. redacted: the same
    without keys and passwords, for files, loggers and the console. job: what the training asks of
    each rank, such as ep_size. last_step: the optimizer step after which it ends.
    """

    config: Config
    redacted: Config
    job: RankJob
    last_step: int

    @classmethod
    def of(cls, config: Config) -> "Start":
        config = shortened(config)
        last = last_step(config)
        return cls(config, redacted(config), rank_job(config), last)

    @property
    def own_classes(self) -> list[str]:
        """The words of a command that name the run's extensions and callbacks."""
        return words(self.config.extensions, self.config.callbacks)

    @cached_property
    def model(self) -> Any:
        """The whole network on the meta device, built at the first use. Ranks other than 0 need it
        for strategy.dense=auto only. ConfigError: an extension's network cannot be used."""
        return build_model_on_meta(self.config)

    def updated_by_muon(self) -> list[nn.Parameter]:
        """Return the parameters of `model` that Muon updates."""
        return updated_by_muon(self.config, self.model)

    def data(self) -> PositionedDataModule:
        """Seed the generators and return the datamodule."""
        seed_everything(self.config)
        return build_datamodule(self.config)

    def prepare(self, init_from: str | None, data: PositionedDataModule) -> None:
        """Prepare the data before other ranks are started.

        init_from: what the initial weights are read from; None: nothing. ConfigError: it or the
        data cannot be used.
        """
        kind, _, path = (init_from or "").partition(":")
        if kind:
            initial_weights(self.config, self.model)  # its checks, before data is prepared
        prepare_data(data, Path(path) if kind == "scmoe" else None)
        for text in doubts(self.config, data):
            warn_once(text)

    def module(self, init_from: str | None) -> MoEModule:
        """Return the LightningModule, which builds its network when the ranks exist.

        init_from: None where a checkpoint has its weights.
        """
        return build_module(replace(self.config, init_from=init_from))

    def callbacks(self, directory: Path | None) -> list[Callback]:
        """Return the callbacks. directory: of the run, on rank 0; None on other ranks."""
        return build_callbacks(self.config, directory)

    def trainer(self, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer:
        """Return the Trainer with its Strategy."""
        strategy = build_strategy(self.config, self.job.ep_size, dense_estimates(self))
        return build_trainer(self.config, callbacks, loggers, strategy, self.last_step)

    def samples(self, trainer: Trainer, module: Any, data: PositionedDataModule) -> list[str]:
        """Return a few short texts of the trained model. Every rank must call it."""
        return sample_text(trainer, module, data)


def dense_estimates(start: Start) -> dict[str, float] | None:
    """Return for each mode of dense weights the bytes that a rank needs at most, activations
    included; None where strategy.dense names the mode."""
    job = start.job
    if job.dense != "auto":
        return None
    modes = possible_modes(start.model, job.ranks, job.dp_size, job.node_size)
    return {mode: rank_memory(start.model, replace(job, dense=mode))["total"] for mode in modes}


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
