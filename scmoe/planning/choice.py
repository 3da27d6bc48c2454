"""What a planner chooses, a ModelChoice: how each MoE layer runs, how many batches are in flight,
and the measured times that predict what it takes (schedule/cost.py, schedule/stack.py).

pricing.py ranks the candidates, and planner.py decides (`Planner.decide`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scmoe.schedule.cost import (
    OperatorTimes,
    elapsed_time,
    exposed_time,
    mismatch,
    overlapped_time,
    slots,
)
from scmoe.schedule.play import TRANSFERS
from scmoe.schedule.schedule import ModelSchedule, Schedule
from scmoe.schedule.stack import half_of, waiting_time, windows_time


@dataclass(frozen=True)
class LayerChoice:
    """What one MoE layer runs as, and why.

    Times are in seconds, measured with one transfer at a time and one batch in flight: those of the
    slowest rank of an EP group, averaged over the groups.
    """

    schedule: Schedule
    times: dict[int, OperatorTimes]  # by number of chunks
    # forward, backward: from tap to end with the fewest chunks, measured
    sequential: tuple[float, ...]

    @property
    def predicted(self) -> float:
        """Seconds from the tap to the end of the block, and back."""
        return elapsed_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def exposed(self) -> float:
        return exposed_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def eq11(self) -> Schedule:
        """The schedule at the slot that Eq. 11 would choose, which knows whole operators only."""
        between = [schedule for schedule in slots(self.schedule) if not schedule.inside_attention]
        return min(between, key=lambda s: mismatch(s, self.times[s.chunks]))

    @property
    def overlapped(self) -> float:
        """Seconds in which transfers run beside computation."""
        return overlapped_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def overlapped_by_chunks(self) -> float | None:
        """The same if only chunks hid these rows (pipelining, without a window), at most; None: no
        chunks were measured."""
        in_chunks = [
            overlapped_time(Schedule("top_k", chunks=chunks), times)
            for chunks, times in self.times.items()
            if chunks > 1
        ]
        return max(in_chunks, default=None)

    @property
    def free(self) -> tuple[float, float]:
        """`sequential` without its transfers."""
        fewest = self.times[min(self.times)]
        forward = sum(fewest.forward[transfer] for transfer in TRANSFERS)
        backward = sum(fewest.backward[transfer] for transfer in TRANSFERS)
        return self.sequential[0] - forward, self.sequential[1] - backward


@dataclass(frozen=True)
class ModelChoice:
    """How a model runs, and why. layers: those with an MoE, in order. batches: in flight."""

    layers: tuple[LayerChoice, ...]
    batches: int = 1

    @property
    def schedule(self) -> ModelSchedule:
        return ModelSchedule(tuple(layer.schedule for layer in self.layers), self.batches)

    @property
    def in_two_batches(self) -> "ModelChoice":
        """The same schedules of the layers with two batches in flight."""
        return replace(self, batches=2)

    @property
    def predicted(self) -> float:
        """Seconds of the windows of all layers, together with the waits that two batches in flight
        leave."""
        if self.batches == 2:
            return windows_time(self.halves)
        return sum(layer.predicted for layer in self.layers)

    @property
    def halves(self) -> list[tuple[Schedule, OperatorTimes]]:
        """The layers with the times of half the rows, as if these took half as long."""
        return [
            (layer.schedule, half_of(layer.times[layer.schedule.chunks])) for layer in self.layers
        ]

    @property
    def predicted_and_exposed(self) -> Sequence[tuple[float, float]]:
        """For each layer the seconds of its window, and how long it waits for transfers; with two
        batches in flight, the mean over the layers."""
        if self.batches == 1:
            return [(layer.predicted, layer.exposed) for layer in self.layers]
        mean = windows_time(self.halves), waiting_time(self.halves)
        return [(mean[0] / len(self.layers), mean[1] / len(self.layers)) for _ in self.layers]
