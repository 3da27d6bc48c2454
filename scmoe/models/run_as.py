"""How a model runs is one value, a ModelSchedule, and `run_as` sets it.

The blocks keep their schedules (MoEBlock.run_as sets one block), and a network's `Halves` the
number of batches in flight. A model may be wrapped (DDP, torch.compile, an adapter): what is set is
found inside.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.models.halves import Halves
from scmoe.moe.dispatcher import Dispatcher
from scmoe.moe.operators import AnyRecorder
from scmoe.schedule.schedule import ModelSchedule


def schedule_of(model: nn.Module) -> ModelSchedule:
    """Return how a model runs. Raises ValueError if it has networks that run differently."""
    return _Parts.of(model).schedule()


def run_as(
    model: nn.Module,
    schedule: ModelSchedule,
    dispatchers: Sequence[Dispatcher] | None = None,
    recorders: Sequence[AnyRecorder | None] | None = None,
) -> None:
    """Set how a model runs from the next pass on.

    dispatchers, recorders: how the rows of each block travel, and what notes its operators; None:
    as before. Raises ValueError for two batches in flight if no network in the model has a Halves.
    """
    _Parts.of(model).run_as(schedule, dispatchers, recorders)


class running_as:
    """A context in which a model runs by `schedule`, and as before afterwards. Arguments and
    errors are those of `run_as`.

    Generation enters one at each token, so entering it is cheap: the model's parts are those that
    it had when the context was created. Not reentrant.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: ModelSchedule,
        dispatchers: Sequence[Dispatcher] | None = None,
    ) -> None:
        self.parts = _Parts.of(model)
        self.inside = schedule, dispatchers

    def __enter__(self) -> None:
        dispatchers = [block.moe.dispatcher for block in self.parts.blocks]
        self.before = self.parts.schedule(), dispatchers
        self.parts.run_as(*self.inside)

    def __exit__(self, *error: object) -> None:
        self.parts.run_as(*self.before)


def halves_of(model: nn.Module) -> list[Halves]:
    """Return what runs the blocks of the networks in a model that can have two batches in
    flight."""
    return [module for module in model.modules() if isinstance(module, Halves)]


class _Parts(NamedTuple):
    """What keeps how a model runs."""

    name: str  # of the model's class
    blocks: list[MoEBlock]
    networks: list[Halves]

    @classmethod
    def of(cls, model: nn.Module) -> "_Parts":
        return cls(type(model).__name__, moe_blocks_of(model), halves_of(model))

    def schedule(self) -> ModelSchedule:
        numbers = {halves.batches_in_flight for halves in self.networks} or {1}
        if len(numbers) > 1:
            raise ValueError(
                f"The networks in {self.name} have different numbers of batches in flight. Ask for"
                " the schedule of each."
            )
        return ModelSchedule(tuple(block.schedule for block in self.blocks), numbers.pop())

    def run_as(
        self,
        schedule: ModelSchedule,
        dispatchers: Sequence[Dispatcher] | None,
        recorders: Sequence[AnyRecorder | None] | None = None,
    ) -> None:
        if schedule.batches_in_flight > 1 and not self.networks:
            raise ValueError(
                f"{self.name} has no Halves, so it cannot have two batches in flight. Use"
                " scmoe.models.decoder.Decoder, or call the blocks through a Halves of"
                " scmoe/models/halves.py."
            )
        dispatchers = dispatchers or [block.moe.dispatcher for block in self.blocks]
        recorders = recorders or [block.recorder for block in self.blocks]
        parts = zip(self.blocks, schedule.blocks, dispatchers, recorders, strict=True)
        for block, of_block, dispatcher, recorder in parts:
            block.run_as(of_block, dispatcher, recorder)
        for halves in self.networks:
            halves.batches_in_flight = schedule.batches_in_flight
