"""The adaptive schedule (section 3.2): measure the operators of this model on this hardware, then
choose.

The planner uses ordinary training steps. Their results are bit-identical for every slot; chunks and
two batches in flight change the order of sums.
The bench of inference uses passes in place of steps, up to `price`.

    warm up     as configured
    measure     transfers one at a time (`Blocking`), some steps with each number of chunks in turn:
                the time of every operator and transfer, forward and backward
    price       all of cost.slots with each number of chunks, by the times of the slowest rank
                (pricing.py)
    try         whole training steps with the candidates of low price in turn, round after round,
                until one is left: only a step shows what chunks and halves of a batch cost in
                parallel with computation, and how rows and gradients share a link
    agree       every rank chooses; rank 0's choice is broadcast, and each compares it with its own
    run         as chosen. Some steps are timed for the overlap efficiency
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.models.run_as import halves_of, run_as, schedule_of
from scmoe.moe.dispatcher import Blocking, Dispatcher
from scmoe.moe.operators import Direction
from scmoe.moe.recorder import Recorder
from scmoe.planning.candidates import shortlist_in_flight, still_fastest
from scmoe.planning.choice import ModelChoice
from scmoe.planning.pricing import (
    DIRECTIONS,
    Sample,
    measured,
    price,
    seconds_of_slowest_rank,
    start_clocks,
)
from scmoe.schedule.cost import overlap_efficiency
from scmoe.schedule.schedule import ModelSchedule

WARMUP_STEPS = 3
STEPS_EACH = 3  # measured steps with each number of chunks
MOST_TRIES = 48  # of all candidates together
# of communication in a step: below it, the hidden part is smaller than the noise of the times
LEAST_SHARE = 0.1
NOISE = 0.05  # of a hidden part: further below 0 or above 1, the step was disturbed


@dataclass(frozen=True)
class Overlap:
    """One timed step, all layers together, of the slowest rank (pricing.py).

    Each list is for forward and backward. shares: of communication in the time without overlap.
    efficiency: the hidden part of communication, 0 to 1 + NOISE; None where it cannot be measured:
    below LEAST_SHARE, and in a disturbed step.
    """

    seconds: list[float]
    shares: list[float]
    efficiency: list[float | None]


class Planner:
    """Chooses how a model runs.

    Each rank calls begin_step and end_step around every micro-batch, and close at the end.

    group: the ranks that must agree. chunk_counts: numbers of chunks to choose from; no measured or
    chosen step runs with another. With a single one, and one batch in flight, every result stays
    bit-identical. fixed: keep the schedule as it is and only measure the overlap, while one batch
    is in flight. All blocks must have one number of chunks then. ep_size: consecutive ranks of the
    group that exchange rows; None: all. directions: forward alone prices passes of inference.
    batches: micro-batches per optimizer step. A planner step is one micro-batch; a trial takes
    `batches` of them. numbers_in_flight: of batches, to choose from; measured steps always run one,
    and so does a model that cannot have two.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Any,
        device: torch.device,
        chunk_counts: Sequence[int] = (1, 2, 4),
        fixed: bool = False,
        ep_size: int | None = None,
        directions: Sequence[Direction] = DIRECTIONS,
        batches: int = 1,
        numbers_in_flight: Sequence[int] = (1,),
    ) -> None:
        self.model = model
        self.blocks = moe_blocks_of(model)
        self.group = group
        self.device = device
        self.fixed = fixed
        self.ep_size = ep_size
        self.directions = directions
        self.batches = batches
        self.configured = schedule_of(model).in_one_batch
        # what measured steps run, but with each number of chunks
        self.timed = list(self.configured.blocks)
        if fixed:
            chunk_counts = [schedule.chunks for schedule in self.configured.blocks]
        else:
            self.timed = [block.divided for block in self.blocks]
        self.chunk_counts = sorted(set(chunk_counts))
        assert len(self.chunk_counts) == 1 or not fixed
        self.dispatchers = [block.moe.dispatcher for block in self.blocks]
        self.choice: ModelChoice | None = None
        self.most_tries = MOST_TRIES  # each candidate is tried once, even if this allows fewer
        self.numbers_in_flight = tuple(numbers_in_flight) if halves_of(model) else (1,)

        # purpose of each coming step until the next decision; number of chunks, or of the candidate
        self.agenda = [("warm up", 0)] * WARMUP_STEPS
        self.agenda += [
            ("measure", chunks) for _ in range(STEPS_EACH) for chunks in self.chunk_counts
        ]
        self.samples: dict[int, list[Sample]] = {chunks: [] for chunks in self.chunk_counts}
        self.priced: dict[int, list[ModelChoice]] = {}
        self.candidates: list[ModelChoice] = []
        # seconds of each round, of the candidates that are left
        self.tried: dict[int, list[float]] = {}
        self.tries = 0
        self.overlap: Overlap | None = None
        self.recorders: list[Recorder] | None = None

    @property
    def steps_to_choose(self) -> int:
        """The most micro-batches that pass before the choice is made."""
        has_window = any(schedule.window for schedule in self.configured.blocks)
        numbers = max(len(self.chunk_counts), len(self.numbers_in_flight))
        has_trials = not self.fixed and (numbers > 1 or has_window)
        tries = self.most_tries if has_trials else 0
        return most_steps(len(self.chunk_counts), tries * self.batches)

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions under which a choice is valid."""
        device = self.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(self.device)
        return {
            "ranks": dist.get_world_size(),
            "device": device,
            "backend": dist.get_backend(self.group),
            "layers": [schedule.name for schedule in self.configured.blocks],
            "chunks": self.chunk_counts,
            "batches_in_flight": list(self.numbers_in_flight),
        }

    def take(self, choice: ModelChoice) -> None:
        """Run as an earlier planner has chosen under equal conditions, without measuring first."""
        self.choice = choice
        self.agenda = []
        self.settle()

    def settle(self) -> None:
        """Let the model run as chosen, or as configured if there is no choice yet, without
        recorders. A validation between two steps runs so."""
        self.run_as(self.settled)

    @property
    def settled(self) -> ModelSchedule:
        return self.configured if self.choice is None else self.choice.schedule

    def close(self) -> None:
        """Leave the model as between two steps."""
        self.recorders = None
        self.settle()

    @property
    def doing(self) -> tuple[str, int]:
        """Purpose of the coming step, and the number of chunks that it measures or the candidate.

        The candidate is an index into `candidates`.
        """
        return self.agenda[0] if self.agenda else ("run", 0)

    def begin_step(self, timed: bool = False) -> None:
        """Prepare the model for a step. timed: time this step if the choice has been made and its
        operators can be measured."""
        what, which = self.doing
        schedule = self.settled
        if what == "measure":
            schedule = ModelSchedule(tuple(replace(each, chunks=which) for each in self.timed))
        elif what == "try":
            schedule = self.candidates[which].schedule
        timed = timed and what == "run" and schedule.is_measurable
        notes = what == "measure" or timed
        if notes or what == "try":  # a trial needs one clock
            self.recorders = [Recorder(self.device) for _ in (self.blocks if notes else [None])]
            start_clocks(self.recorders, self.group)
        self.run_as(schedule, what == "measure", self.recorders if notes else None)

    def end_step(self) -> None:
        """Note the step that begin_step announced. Choose when everything is measured."""
        what, which = self.doing
        recorders, self.recorders = self.recorders, None
        self.agenda = self.agenda[1:]
        if recorders is not None:
            self.note(what, which, recorders)
        if what == "run":
            return
        self.settle()  # before the choice, which runs from the next step on
        if not self.agenda:
            self.decide()

    def note(self, what: str, which: int, recorders: Sequence[Recorder]) -> None:
        """Note the times of a step. what, which: as in `doing`."""
        if what == "try":
            self.tried[which][-1] += seconds_of_slowest_rank(recorders[0], self.group)
            return
        schedule = schedule_of(self.model)
        self.run_as(schedule)
        sample = measured(recorders, schedule.blocks, self.group, self.ep_size, self.directions)
        if what == "run":
            self.note_overlap(sample)
        else:
            self.samples[which].append(sample)

    def decide(self) -> None:
        """Try the candidates that are left once more, or choose.

        It is called after the measurement and after each round.
        """
        if not self.candidates:
            self.priced = price(self.samples, self.configured.blocks, self.fixed)
            self.candidates = shortlist_in_flight(self.priced, self.numbers_in_flight)
            self.tried = {i: [] for i in range(len(self.candidates))}
        left = still_fastest(self.tried)
        if len(left) == 1 or (self.tries and self.tries + len(left) > self.most_tries):
            self.choice = self.agree(self.candidates[left[0]])
            return
        self.tried = {i: [*self.tried[i], 0.0] for i in left}
        self.tries += len(left)
        self.agenda = [("try", i) for i in sorted(left) for _ in range(self.batches)]

    def run_as(
        self,
        schedule: ModelSchedule,
        blocking: bool = False,
        recorders: Sequence[Recorder] | None = None,
    ) -> None:
        """Set how the model runs. blocking: wait for each transfer right after its start."""
        if self.fixed:
            schedule = schedule.in_batches_of(schedule_of(self.model))
        dispatchers: list[Dispatcher] = [*self.dispatchers]
        if blocking:
            dispatchers = [Blocking(dispatcher) for dispatcher in self.dispatchers]
        run_as(self.model, schedule, dispatchers, recorders or [None] * len(self.blocks))

    def agree(self, choice: ModelChoice) -> ModelChoice:
        """Return the choice, which is the same on every rank.

        Raises RuntimeError if ranks chose differently.
        """
        numbers = [
            [schedule.slot, schedule.inside_attention, schedule.chunks, choice.batches]
            for schedule in choice.schedule.blocks
        ]
        chosen_L4 = torch.tensor(numbers, dtype=torch.long, device=self.device)
        first_L4 = chosen_L4.clone()
        dist.broadcast(first_L4, group_src=0, group=self.group)
        if not torch.equal(first_L4, chosen_L4):
            raise RuntimeError(
                f"rank {dist.get_rank()} chose (slot, inside attention, chunks, batches in flight)"
                f" {chosen_L4.tolist()}, and rank 0 {first_L4.tolist()}. Set schedule.slot,"
                " schedule.inside_attention, schedule.chunks and schedule.batches_in_flight"
                " instead of schedule.auto."
            )
        return choice

    def note_overlap(self, sample: Sample) -> None:
        """Compute the overlap of a timed step."""
        seconds = sample.elapsed_d.sum(0).tolist()
        assert self.choice is not None
        sequential = sum_of_layers([layer.sequential for layer in self.choice.layers])
        free = sum_of_layers([layer.free for layer in self.choice.layers])
        # A sequential time is 0 where backward does not reach the MoE layers: weights are frozen.
        shares = [1 - f / s if s else 0.0 for s, f in zip(sequential, free, strict=True)]
        each = zip(shares, seconds, sequential, free, strict=True)
        efficiency = [
            hidden_part(*times) if share >= LEAST_SHARE else None for share, *times in each
        ]
        self.overlap = Overlap(seconds, shares, efficiency)


def most_steps(numbers_of_chunks: int, tries: int) -> int:
    """Return the most steps of a planner that pass before the choice is made. numbers_of_chunks:
    how many of them there are to choose from. tries: steps that try a candidate."""
    return WARMUP_STEPS + STEPS_EACH * numbers_of_chunks + tries


def sum_of_layers(seconds_LD: Sequence[Sequence[float]]) -> list[float]:
    """Return the seconds of each direction, summed over layers."""
    return [sum(seconds_L) for seconds_L in zip(*seconds_LD, strict=True)]


def hidden_part(overlapped: float, sequential: float, free: float) -> float | None:
    """Return the hidden part of communication (cost.overlap_efficiency), 0 to 1 + NOISE.

    None: the step was disturbed.
    """
    part = overlap_efficiency(overlapped, sequential, free)
    return max(0.0, part) if -NOISE <= part <= 1 + NOISE else None
