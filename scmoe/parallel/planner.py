"""The adaptive schedule (section 3.2): measure the operators of this model on this hardware, then choose.

Training steps are used as they come, and what they compute stays the same to the bit, whatever the slot:

    warm up     as configured
    measure     transfers one at a time (`Blocking`), some steps at each number of chunks in turn: the time of every
                operator and transfer, forward and backward
    price       all ranks' times are gathered; for every number of chunks, each MoE layer's best slot by
                schedule/cost.py
    try         where there are several numbers, some steps as priced with each in turn: what cutting costs beside
                computation shows only there
    agree       every rank chooses per MoE layer, and rank 0's choice is broadcast and compared with each rank's own
    run         as planned; now and then a step is timed, for the overlap efficiency, and where steps have drifted from
                the first that was timed, all is measured anew
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Blocking
from scmoe.moe.operators import Direction, Recorder
from scmoe.schedule.cost import (
    PER_CHUNK,
    OperatorTimes,
    best_schedule,
    elapsed_time,
    exposed_time,
    mismatch,
    overlap_efficiency,
    slots,
)
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.timeline import TRANSFERS

STREAM = ("route", "encode", "dispatch", "experts", "combine", "decode")
OPERATORS = (*STREAM, "attention", "mlp", "shared_expert", "current")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
WARMUP_STEPS, STEPS_EACH, TRIES_EACH = 3, 3, 5  # the last two: with each number of chunks
DRIFT, DRIFTED_IN_TURN = 1.5, 3  # times as long or as short as the first, so many timed steps in turn


@dataclass(frozen=True)
class Plan:
    """What one MoE layer runs as, and why. Seconds, transfers one at a time, the mean over ranks."""

    schedule: Schedule
    times: dict[int, OperatorTimes]  # by number of chunks
    sequential: tuple[float, float]  # forward, backward: from tap to end with the fewest chunks, measured

    @property
    def predicted(self) -> float:
        """Seconds from the tap to the end of the block, and back."""
        return elapsed_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def exposed(self) -> float:
        return exposed_time(self.schedule, self.times[self.schedule.chunks])

    @property
    def eq11(self) -> Schedule:
        """The slot that Eq. 11 would choose."""
        return min(slots(self.schedule), key=lambda s: mismatch(s, self.times[s.chunks]))

    @property
    def free(self) -> tuple[float, float]:
        """`sequential` without its transfers."""
        fewest = self.times[min(self.times)]
        directions = fewest.forward, fewest.backward
        seconds = [s - sum(d[t] for t in TRANSFERS) for s, d in zip(self.sequential, directions, strict=True)]
        return seconds[0], seconds[1]


@dataclass(frozen=True)
class Overlap:
    """A timed step, all layers together, the mean over ranks; forward and backward."""

    seconds: tuple[float, float]
    efficiency: tuple[float, float]


class Planner:
    """Plans `blocks`, each with its schedule, moe and recorder.

    group: the ranks that must agree. Each calls begin_step and end_step around every training step, and close at the
    end.
    chunk_counts: numbers of chunks to choose from, and no step runs with another: a single one leaves every bit as it
    is. fixed: measure, but keep the schedules as they are, so that a run without a plan can tell its overlap too; all
    blocks have the same number of chunks then.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        group: Any,
        device: torch.device,
        chunk_counts: Sequence[int] = (1, 2, 4),
        fixed: bool = False,
    ) -> None:
        self.blocks, self.group, self.device, self.fixed = list(blocks), group, device, fixed
        self.own: list[Schedule] = [block.schedule for block in blocks]
        self.chunk_counts = sorted({s.chunks for s in self.own} if fixed else set(chunk_counts))
        assert len(self.chunk_counts) == 1 or not fixed
        self.dispatchers = [block.moe.dispatcher for block in blocks]
        several = len(self.chunk_counts) > 1
        self.agenda = [("warm up", 0)] * WARMUP_STEPS  # of each step before the plan: what it is for, how many chunks
        self.agenda += [("measure", chunks) for _ in range(STEPS_EACH) for chunks in self.chunk_counts]
        self.agenda += [("try", chunks) for _ in range(TRIES_EACH * several) for chunks in self.chunk_counts]
        self.plans: list[Plan] | None = None
        self.restart()

    def restart(self) -> None:
        """Measures anew from the next step on."""
        self.steps = 0
        self.samples: dict[int, list[Tensor]] = {chunks: [] for chunks in self.chunk_counts}
        self.tried: dict[int, list[Tensor]] = {chunks: [] for chunks in self.chunk_counts}
        self.priced: dict[int, list[Plan]] | None = None
        self.overlap: Overlap | None = None
        self.first_seconds: float | None = None
        self.drifted = 0
        self.recorders: list[Recorder] | None = None

    def close(self) -> None:
        """Leaves the blocks as planned, or as they came where there is no plan yet: nothing notes times or waits."""
        self.recorders = None
        self.record(None)
        self.run_as([plan.schedule for plan in self.plans] if self.plans else self.own, blocking=False)

    @property
    def steps_to_plan(self) -> int:
        """Steps before the first that runs as planned."""
        return len(self.agenda)

    @property
    def backend(self) -> str:
        """What carries the rows."""
        return dist.get_backend(self.group)

    @property
    def doing(self) -> tuple[str, int]:
        """What the coming step is for, and its number of chunks where that is not as configured or planned."""
        return ("run", 0) if self.planned else self.agenda[self.steps]

    def begin_step(self, timed: bool = False) -> None:
        """timed: time this step, if there is a plan by now."""
        what, chunks = self.doing
        if what == "measure":
            self.run_as([replace(schedule, chunks=chunks) for schedule in self.own], blocking=True)
        elif what == "try":
            assert self.priced is not None
            self.run_as([plan.schedule for plan in self.priced[chunks]], blocking=False)
        elif self.steps == self.steps_to_plan:
            assert self.plans is not None
            self.run_as([plan.schedule for plan in self.plans], blocking=False)
        if what in ("measure", "try") or (timed and self.planned):
            self.recorders = [Recorder(self.device) for _ in self.blocks]
        self.record(self.recorders)

    def end_step(self) -> None:
        """After the step whose beginning was announced: makes the plan when all is measured."""
        what, chunks = self.doing
        recorders, self.recorders = self.recorders, None
        self.steps += 1
        if recorders is None:
            return
        self.record(None)
        sample = torch.stack([measured(r, b.schedule) for r, b in zip(recorders, self.blocks, strict=True)])
        if what == "run":
            self.note_overlap(sample)
            return
        if what == "measure":
            self.samples[chunks].append(sample)
            if all(len(samples) == STEPS_EACH for samples in self.samples.values()):
                self.priced = self.price()
        else:
            self.tried[chunks].append(sample[..., -1].sum(-1))
        if self.planned:
            self.plans = self.agree()

    @property
    def planned(self) -> bool:
        return self.steps >= self.steps_to_plan

    def run_as(self, schedules: Sequence[Schedule], blocking: bool) -> None:
        for block, schedule, dispatcher in zip(self.blocks, schedules, self.dispatchers, strict=True):
            block.schedule, block.moe.num_chunks = schedule, schedule.chunks
            block.moe.dispatcher = Blocking(dispatcher) if blocking else dispatcher

    def record(self, recorders: Sequence[Recorder] | None) -> None:
        for i, block in enumerate(self.blocks):
            block.recorder = block.moe.recorder = recorders[i] if recorders else None

    # ------------------------------------------------------------------ choosing

    def price(self) -> dict[int, list[Plan]]:
        """By number of chunks, the best plan of every layer; the same on all ranks."""
        mine = torch.stack([torch.stack(self.samples[c]).median(0).values for c in self.chunk_counts])
        once = [i for i, op in enumerate(OPERATORS) if op not in PER_CHUNK]  # the number of chunks does not change it
        mine[..., once] = torch.cat([torch.stack(s) for s in self.samples.values()]).median(0).values[..., once]
        gathered = gather(mine, self.group)
        seconds = gathered.mean(0)
        for i, op in enumerate(OPERATORS):
            if op in TRANSFERS:  # who waits for a late peer measures more than the transfer
                seconds[..., i] = gathered[..., i].amin(0)
        layers = [self.price_layer(layer, seconds[:, layer]) for layer in range(len(self.blocks))]
        return {chunks: [plans[chunks] for plans in layers] for chunks in self.chunk_counts}

    def price_layer(self, layer: int, seconds_C2O: Tensor) -> dict[int, Plan]:
        """By number of chunks, the best plan of one layer."""
        times = {}
        for chunks, (forward, backward) in zip(self.chunk_counts, seconds_C2O.tolist(), strict=True):
            named = (dict(zip(OPERATORS, direction, strict=False)) for direction in (forward, backward))
            times[chunks] = OperatorTimes(*named)
        own = self.own[layer]
        sequential = tuple(seconds_C2O[0, :, -1].tolist())  # with the fewest chunks

        def best(chunks: int) -> Schedule:
            return own if self.fixed else best_schedule(slots(replace(own, chunks=chunks)), times)

        return {chunks: Plan(best(chunks), times, sequential) for chunks in self.chunk_counts}

    def agree(self) -> list[Plan]:
        """The same plan on every rank. RuntimeError: ranks chose differently."""
        assert self.priced is not None
        plans = [self.priced[chunks][layer] for layer, chunks in enumerate(self.fastest())]
        choice = torch.tensor([[p.schedule.slot, p.schedule.chunks] for p in plans], device=self.device)
        told = choice.clone()
        dist.broadcast(told, group_src=0, group=self.group)
        if not torch.equal(told, choice):
            raise RuntimeError(f"rank {dist.get_rank()} plans (slot, chunks) {choice.tolist()}, rank 0 {told.tolist()}")
        return plans

    def fastest(self) -> list[int]:
        """Each layer's number of chunks: the one that took the least time when it was tried."""
        if len(self.chunk_counts) == 1:
            return self.chunk_counts * len(self.blocks)
        mine = torch.stack([torch.stack(tried) for tried in self.tried.values()])
        seconds_CL = gather(mine, self.group).mean(0).amin(1)  # what disturbs a step only makes it longer
        return [min(zip(seconds, self.chunk_counts, strict=True))[1] for seconds in seconds_CL.T.tolist()]

    # ------------------------------------------------------------------ watching

    def note_overlap(self, sample_L2O: Tensor) -> None:
        assert self.plans is not None
        forward, backward = gather(sample_L2O[:, :, -1].sum(0), self.group).mean(0).tolist()
        sums = [[sum(getattr(p, kind)[d] for p in self.plans) for d in (0, 1)] for kind in ("sequential", "free")]
        efficiency = [overlap_efficiency(t, s, f) for t, s, f in zip((forward, backward), *sums, strict=True)]
        self.overlap = Overlap((forward, backward), (efficiency[0], efficiency[1]))
        if self.first_seconds is None:
            self.first_seconds = forward + backward
        ratio = (forward + backward) / self.first_seconds
        self.drifted = 0 if 1 / DRIFT <= ratio <= DRIFT else self.drifted + 1
        if self.drifted == DRIFTED_IN_TURN:
            self.restart()


def measured(recorder: Recorder, schedule: Schedule) -> Tensor:
    """[2, OPERATORS + 1] seconds forward and backward: each operator's between the tap and the end of the block, of all
    chunks together, then the time from the tap to the end."""
    rows = []
    for direction in DIRECTIONS:
        spans = recorder.spans(direction)
        if direction == "forward":
            tap = next(span.start for span in spans if span.operator == "route")
            spans = [span for span in spans if span.start >= tap]
        else:  # from the end of the list: the mirror
            tap = max(span.end for span in spans if span.operator == "route")
            spans = [span for span in spans if span.end <= tap][::-1]
        row, ends = [], []
        for operator in OPERATORS:
            count = schedule.operators().count(operator)
            own = [span for span in spans if span.operator == operator][:count]
            ends += [abs(t - tap) for span in own for t in (span.start, span.end)]
            total = sum(span.end - span.start for span in own)
            row.append(total if operator in PER_CHUNK else total / max(1, len(own)))
        rows.append([*row, max(ends)])
    return torch.tensor(rows, dtype=torch.float64)


def gather(values: Tensor, group: Any) -> Tensor:
    """[ranks, ...] on the host."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    values = values.to(device) if device else values
    all_values = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(all_values), values.contiguous(), group=group)
    return all_values.cpu()
