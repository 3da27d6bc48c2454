"""From measured seconds to a choice: the time of every operator, and the best schedule of each MoE layer by
schedule/cost.py. planner.py decides which steps are measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.operators import Direction, Recorder
from scmoe.schedule.cost import PER_CHUNK, OperatorTimes, best_schedule, elapsed_time, exposed_time, mismatch, slots
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.timeline import TRANSFERS, Span

STREAM = ("route", "encode", "dispatch", "experts", "combine", "decode")
OPERATORS = (*STREAM, "attention", "mlp", "shared_expert", "current")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class LayerChoice:
    """What one MoE layer runs as, and why. Times are in seconds, transfers one at a time, the mean over ranks."""

    schedule: Schedule
    times: dict[int, OperatorTimes]  # by number of chunks
    sequential: tuple[float, ...]  # forward, backward: from tap to end with the fewest chunks, measured

    @property
    def predicted(self) -> float:
        """Seconds from the tap to the end of the block, and back."""
        return elapsed_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def exposed(self) -> float:
        return exposed_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def eq11(self) -> Schedule:
        """The schedule at the slot that Eq. 11 would choose."""
        return min(slots(self.schedule), key=lambda s: mismatch(s, self.times[s.chunks]))

    @property
    def free(self) -> tuple[float, float]:
        """`sequential` without its transfers."""
        fewest = self.times[min(self.times)]
        forward, backward = (sum(times[t] for t in TRANSFERS) for times in (fewest.forward, fewest.backward))
        return self.sequential[0] - forward, self.sequential[1] - backward


def measured(recorder: Recorder, schedule: Schedule, directions: Sequence[Direction] = DIRECTIONS) -> Tensor:
    """[directions, OPERATORS + 1] seconds: the time of each operator between the tap and the end of the block, summed
    over chunks, then the time from the tap to the end. directions: forward alone is inference."""
    rows = []
    for direction in directions:
        tap, spans = from_tap(recorder.spans(direction), direction)
        row, ends = [], []
        for operator in OPERATORS:
            count = schedule.operators().count(operator)
            own = [span for span in spans if span.operator == operator][:count]
            ends += [abs(t - tap) for span in own for t in (span.start, span.end)]
            total = sum(span.end - span.start for span in own)
            row.append(total if operator in PER_CHUNK else total / max(1, len(own)))
        rows.append([*row, max(ends, default=0.0)])
    return torch.tensor(rows, dtype=torch.float64)


def from_tap(spans: Sequence[Span], direction: Direction) -> tuple[float, list[Span]]:
    """Return the time at the tap, and the spans from the tap to the end of the block; backward is the mirror.

    If everything before the block is frozen, backward ends before the gate; its last span then counts as the tap."""
    if direction == "forward":
        tap = next(span.start for span in spans if span.operator == "route")
        return tap, [span for span in spans if span.start >= tap]
    of_gate = [span for span in spans if span.operator == "route"]
    tap = max((span.end for span in of_gate or spans), default=0.0)
    return tap, [span for span in spans if span.end <= tap][::-1]


def price(
    samples: Mapping[int, Sequence[Tensor]], own: Sequence[Schedule], group: Any, fixed: bool
) -> dict[int, list[LayerChoice]]:
    """The best choice of every layer, by number of chunks; equal on all ranks.

    samples: by number of chunks, ascending, what `measured` returned for each step, stacked over layers
    [L, directions, O + 1].
    own: the configured schedule of each layer. fixed: it is the only choice.
    """
    steps = [torch.stack(list(own_samples)) for own_samples in samples.values()]
    mine = torch.stack([own_steps.median(0).values for own_steps in steps])
    once = [i for i, op in enumerate(OPERATORS) if op not in PER_CHUNK]  # the number of chunks does not change these
    mine[..., once] = torch.cat(steps).median(0).values[..., once]
    gathered = gather(mine, group)
    seconds = gathered.mean(0)
    for i, op in enumerate(OPERATORS):
        if op in TRANSFERS:  # a rank that waits for a late peer measures more than the transfer
            seconds[..., i] = gathered[..., i].amin(0)
    layers = [price_layer(list(samples), seconds[:, layer], schedule, fixed) for layer, schedule in enumerate(own)]
    return {chunks: [choices[chunks] for choices in layers] for chunks in samples}


def price_layer(chunk_counts: Sequence[int], seconds_C2O: Tensor, own: Schedule, fixed: bool) -> dict[int, LayerChoice]:
    """The best choice of one layer, by number of chunks."""
    times = {}
    for chunks, directions in zip(chunk_counts, seconds_C2O.tolist(), strict=True):
        times[chunks] = OperatorTimes(*(dict(zip(OPERATORS, seconds, strict=False)) for seconds in directions))
    sequential = tuple(seconds_C2O[0, :, -1].tolist())  # with the fewest chunks

    def best(chunks: int) -> Schedule:
        return own if fixed else best_schedule(slots(replace(own, chunks=chunks)), times)

    return {chunks: LayerChoice(best(chunks), times, sequential) for chunks in chunk_counts}


def gather(values: Tensor, group: Any) -> Tensor:
    """[ranks, ...] on the host: the values of all ranks."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    values = values.to(device) if device else values
    all_values = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(all_values), values.contiguous(), group=group)
    return all_values.cpu()
