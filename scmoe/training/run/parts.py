"""What a run asks of `Start` (assembly/start.py), which is made from a configuration and documents
these members.

The files that run a training (train.py, machine.py, printout.py) take it as `RunParts`. So they do
not import how models, data and callbacks are built: train.py needs half as many files as start.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from scmoe.config.fields import Config
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.parallel.dense.memory import RankJob
from scmoe.training.modules import MoEModule


class RunParts(Protocol):
    """The parts in the order in which a run asks for them."""

    @property
    def config(self) -> Config: ...
    @property
    def redacted(self) -> Config: ...
    @property
    def job(self) -> RankJob: ...
    @property
    def last_step(self) -> int: ...
    @property
    def own_classes(self) -> list[str]: ...
    @property
    def model(self) -> Any: ...

    def updated_by_muon(self) -> list[nn.Parameter]: ...
    def data(self) -> PositionedDataModule: ...
    def prepare(self, init_from: str | None, data: PositionedDataModule) -> None: ...
    def module(self, init_from: str | None) -> MoEModule: ...
    def callbacks(self, directory: Path | None) -> list[Callback]: ...
    def trainer(self, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer: ...
    def samples(self, trainer: Trainer, module: Any, data: PositionedDataModule) -> list[str]: ...
