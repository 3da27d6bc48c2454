"""The adaptive schedule (section 3.2): measure the operators of this model on this hardware, then choose.

The planner uses ordinary training steps. Their results stay bit-identical for every slot. inference_planner.py uses
passes in place of steps, up to `price`.

    warm up     as configured
    measure     transfers one at a time (`Blocking`), some steps with each number of chunks in turn: the time of every
                operator and transfer, forward and backward
    price       by the times of the slowest rank; for each number of chunks, the best slot of each MoE layer is computed
                (pricing.py)
    try         with several numbers of chunks: some steps with each in turn, at its best slots; only this shows what
                more chunks cost in parallel with computation
    agree       every rank chooses per MoE layer; rank 0's choice is broadcast, and each rank compares it with its own
    run         as chosen. Some steps are timed for the overlap efficiency; where they drift from the first that was
                timed, the planner measures again
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.blocks.moe_block import MoEBlock
from scmoe.moe.dispatcher import Blocking
from scmoe.moe.operators import Direction, Recorder
from scmoe.planning.pricing import DIRECTIONS, LayerChoice, measured, price, start_clocks
from scmoe.schedule.cost import overlap_efficiency
from scmoe.schedule.schedule import Schedule

WARMUP_STEPS, STEPS_EACH, TRIES_EACH = 3, 3, 5  # the last two: with each number of chunks
REFERENCES = ("sequential", "free")  # times of a choice: each transfer waited for at once, and without transfers
LEAST_SHARE = 0.1  # of communication: below it, its hidden part is smaller than the noise of the times
NOISE = 0.05  # of a hidden part: further below 0 or above 1, the step was disturbed
DRIFT, DRIFTED_IN_TURN = 1.5, 3  # a drifted step takes DRIFT times as long or as short; so many in turn


@dataclass(frozen=True)
class Overlap:
    """One timed step, all layers together, of the slowest rank (pricing.py); forward and backward.

    shares: of communication in the time without overlap. efficiency: the hidden part of it, 0 to 1 + NOISE; None where
    it cannot be measured: below LEAST_SHARE, and in a disturbed step.
    """

    seconds: list[float]
    shares: list[float]
    efficiency: list[float | None]


class Planner:
    """Chooses the schedules of `blocks`.

    group: the ranks that must agree. Each rank calls begin_step and end_step around every training step, and close at
    the end.
    chunk_counts: numbers of chunks to choose from; no measured or chosen step runs with another, so with a single one
    every result stays bit-identical.
    fixed: keep the schedules as they are and only measure the overlap. All blocks must have one number of chunks then.
    ep_size: consecutive ranks of the group that exchange rows; None: all.
    directions: forward alone prices passes of inference.
    """

    def __init__(
        self,
        blocks: Sequence[MoEBlock],
        group: Any,
        device: torch.device,
        chunk_counts: Sequence[int] = (1, 2, 4),
        fixed: bool = False,
        ep_size: int | None = None,
        directions: Sequence[Direction] = DIRECTIONS,
    ) -> None:
        self.blocks, self.group, self.device, self.fixed = list(blocks), group, device, fixed
        self.ep_size, self.directions = ep_size, directions
        self.own = [block.schedule for block in blocks]
        self.chunk_counts = sorted({s.chunks for s in self.own} if fixed else set(chunk_counts))
        assert len(self.chunk_counts) == 1 or not fixed
        self.dispatchers = [block.moe.dispatcher for block in blocks]
        several = len(self.chunk_counts) > 1
        # (purpose, number of chunks) of each step before the choice
        self.agenda = [("warm up", 0)] * WARMUP_STEPS
        self.agenda += [("measure", chunks) for _ in range(STEPS_EACH) for chunks in self.chunk_counts]
        self.agenda += [("try", chunks) for _ in range(TRIES_EACH * several) for chunks in self.chunk_counts]
        self.steps_to_choose = len(self.agenda)
        self.choices: list[LayerChoice] = []
        self.restart()

    def restart(self) -> None:
        """Measures again from the next step on."""
        self.steps = 0
        self.samples: dict[int, list[Tensor]] = {chunks: [] for chunks in self.chunk_counts}
        self.tried: dict[int, list[Tensor]] = {chunks: [] for chunks in self.chunk_counts}
        self.priced: dict[int, list[LayerChoice]] = {}
        self.overlap: Overlap | None = None
        self.first_seconds: float | None = None
        self.drifted = 0
        self.recorders: list[Recorder] | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions under which a choice is valid: ranks, device, backend, layers and numbers of chunks."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        ranks, names = dist.get_world_size(), [schedule.name for schedule in self.own]
        place = {"ranks": ranks, "device": device, "backend": self.backend}
        return {**place, "layers": names, "chunks": self.chunk_counts}

    def take(self, choices: Sequence[LayerChoice]) -> None:
        """Runs as an earlier planner has chosen under equal conditions, without measuring first."""
        self.choices, self.steps = list(choices), self.steps_to_choose

    def close(self) -> None:
        """Leaves the blocks as chosen, or as configured where there is no choice yet, without recorders."""
        self.recorders = None
        self.run_as([choice.schedule for choice in self.choices] if self.choices else self.own)

    @property
    def has_chosen(self) -> bool:
        return self.steps >= self.steps_to_choose

    @property
    def backend(self) -> str:
        """Name of the backend that transfers the rows."""
        return dist.get_backend(self.group)

    @property
    def doing(self) -> tuple[str, int]:
        """Purpose of the coming step, and the number of chunks that it measures or tries."""
        return ("run", 0) if self.has_chosen else self.agenda[self.steps]

    def begin_step(self, timed: bool = False) -> None:
        """timed: time this step if the choice has been made."""
        what, chunks = self.doing
        schedules = [block.schedule for block in self.blocks]
        if what == "measure":
            schedules = [replace(schedule, chunks=chunks) for schedule in self.own]
        elif what != "warm up":
            choices = self.priced[chunks] if what == "try" else self.choices
            schedules = [choice.schedule for choice in choices]
        if what in ("measure", "try") or (what == "run" and timed):
            self.recorders = [Recorder(self.device) for _ in self.blocks]
            start_clocks(self.recorders, self.group)
        self.run_as(schedules, what == "measure", self.recorders)

    def end_step(self) -> None:
        """Call it after the step that begin_step announced. Chooses when everything is measured."""
        what, chunks = self.doing
        recorders, self.recorders = self.recorders, None
        self.steps += 1
        if recorders is None:
            return
        schedules = [block.schedule for block in self.blocks]
        self.run_as(schedules)
        sample = measured(recorders, schedules, self.group, self.ep_size, self.directions)
        if what == "run":
            self.note_overlap(sample)
            return
        if what == "measure":
            self.samples[chunks].append(sample)
            if all(len(samples) == STEPS_EACH for samples in self.samples.values()):
                self.priced = price(self.samples, self.own, self.fixed)
        else:
            self.tried[chunks].append(sample[..., -1].sum(-1))
        if self.has_chosen:
            self.choices = self.agree()

    def run_as(
        self, schedules: Sequence[Schedule], blocking: bool = False, recorders: Sequence[Recorder] | None = None
    ) -> None:
        for i, (block, schedule, dispatcher) in enumerate(zip(self.blocks, schedules, self.dispatchers, strict=True)):
            recorder = recorders[i] if recorders else None
            block.run_as(schedule, Blocking(dispatcher) if blocking else dispatcher, recorder)

    def agree(self) -> list[LayerChoice]:
        """The same choice on every rank. Raises RuntimeError if ranks chose differently."""
        choices = [self.priced[chunks][layer] for layer, chunks in enumerate(self.fastest())]
        mine = torch.tensor([[c.schedule.slot, c.schedule.chunks] for c in choices], device=self.device)
        first = mine.clone()
        dist.broadcast(first, group_src=0, group=self.group)
        if not torch.equal(first, mine):
            raise RuntimeError(
                f"rank {dist.get_rank()} chose (slot, chunks) {mine.tolist()}, rank 0 {first.tolist()}; allowed: the "
                "same on all ranks; set schedule.slot and schedule.chunks instead of schedule.auto"
            )
        return choices

    def fastest(self) -> list[int]:
        """The number of chunks of each layer that took the least time when it was tried."""
        if len(self.chunk_counts) == 1:
            return self.chunk_counts * len(self.blocks)
        tried = torch.stack([torch.stack(own) for own in self.tried.values()])
        seconds_CL = tried.amin(1)  # a disturbance only makes a step longer
        return [min(zip(seconds, self.chunk_counts, strict=True))[1] for seconds in seconds_CL.T.tolist()]

    def note_overlap(self, sample_L2O: Tensor) -> None:
        """Computes the overlap of a timed step, and measures again after DRIFTED_IN_TURN drifted ones."""
        seconds = sample_L2O[:, :, -1].sum(0).tolist()
        sequential, free = ([sum(getattr(c, kind)[d] for c in self.choices) for d in (0, 1)] for kind in REFERENCES)
        shares = [1 - f / s if s else 0.0 for s, f in zip(sequential, free, strict=True)]  # 0: backward without MoE
        each = zip(shares, seconds, sequential, free, strict=True)
        efficiency = [hidden_part(*times) if share >= LEAST_SHARE else None for share, *times in each]
        self.overlap = Overlap(seconds, shares, efficiency)
        if self.first_seconds is None:
            self.first_seconds = sum(seconds)
        ratio = sum(seconds) / self.first_seconds
        self.drifted = 0 if 1 / DRIFT <= ratio <= DRIFT else self.drifted + 1
        if self.drifted == DRIFTED_IN_TURN:
            self.restart()


def hidden_part(overlapped: float, sequential: float, free: float) -> float | None:
    """The hidden part of communication (cost.overlap_efficiency), 0 to 1 + NOISE. None: the step was disturbed."""
    part = overlap_efficiency(overlapped, sequential, free)
    return max(0.0, part) if -NOISE <= part <= 1 + NOISE else None
