"""What a run needs to know of what it trains: a configuration and its parts.

assembly/start.py has them for every configuration. A part is made when the run asks for it, because
the directory, the loggers and the ranks come into being one after the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from scmoe.config.fields import Config
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.estimate.memory import RankJob
from scmoe.training.modules import MoEModule


class Parts(Protocol):
    """The parts in the order in which a run asks for them."""

    @property
    def config(self) -> Config: ...

    @property
    def redacted(self) -> Config:
        """The configuration without keys and passwords, for files, loggers and the console."""

    @property
    def job(self) -> RankJob:
        """What the training asks of each rank."""

    @property
    def last_step(self) -> int:
        """The optimizer step after which the training ends."""

    @property
    def model(self) -> Any:
        """The whole network on the meta device, to count parameters and memory."""

    def updated_by_muon(self) -> list[nn.Parameter]:
        """Return the parameters of `model` that Muon updates."""

    def data(self) -> PositionedDataModule:
        """Seed the generators and return the datamodule."""

    def prepare(self, init_from: str | None, data: PositionedDataModule) -> None:
        """Prepare data and check initial weights, on rank 0 before other ranks are started."""

    def module(self, init_from: str | None) -> MoEModule:
        """Return the LightningModule. init_from: None where a checkpoint has its weights."""

    def callbacks(self, directory: Path | None) -> list[Callback]:
        """Return the callbacks. directory: of the run, on rank 0; None on other ranks."""

    def trainer(self, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer:
        """Return the Trainer with its Strategy."""

    def samples(self, trainer: Trainer, module: Any, data: PositionedDataModule) -> list[str]:
        """Return a few short texts of the trained model. Every rank must call it."""
