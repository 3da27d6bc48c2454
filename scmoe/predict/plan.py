"""The rows of an advice: each model in every way that it may run, and its steps on a machine.

    top2              standard, sequential transfers
    top2_pipelined    the same model in chunks
    NAME_two          any model with two batches in flight
    the others        overlapped, at the best slot and chunks

Slots between two operators are tried, none inside an attention.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from random import Random
from typing import Literal, NamedTuple, Protocol

from scmoe.predict.operator_costs import Costs
from scmoe.predict.profile import BANDS, Machine, Profile, scaled
from scmoe.predict.row_names import PIPELINED, TWO
from scmoe.predict.simulated_step import Block, Head, Setting, StepTime, simulate_step
from scmoe.predict.timed_blocks import Sizes, at_schedule, blocks_on, update_seconds
from scmoe.schedule.play import Load
from scmoe.schedule.schedule import Schedule

CHUNKS = (1, 2, 4, 8)
CHUNKS_OF_HALVES = (1, 2)
BEST = 4  # schedules of a row that are played on every drawn machine
ROW_ERROR = 0.02  # assumed
MORE_TOKENS = (2, 4, 8, 16, 32, 64)  # times as many, of which the first that pays is named
SHARED = "shared_expert"


class LoadOf(Protocol):
    """Returns the load of each of a number of steps, in so many chunks. top_k: of the block; None:
    that of the model's architecture."""

    def __call__(self, chunks: int, top_k: int | None = None, /) -> Sequence[Load]: ...


@dataclass(frozen=True, eq=False)
class Model:
    """A model to be compared. name: of its architecture. schedule: of the blocks that have it.
    memory: returns the bytes of a rank at most, in so many chunks and batches in flight. loads: of
    its rows; None: even."""

    name: str
    costs: Costs
    schedule: Schedule
    memory: Callable[[int, int], float]
    loads: LoadOf | None = None


@dataclass(frozen=True)
class Job:
    """What all rows share. two: whether a rank's batch can be halved."""

    sizes: Sizes
    accumulate: int
    two: bool


class Choice(NamedTuple):
    """How a row may run."""

    schedule: Schedule
    batches_in_flight: Literal[1, 2]
    sequential: bool


def choices_of(model: Model, standard: str, two: bool) -> dict[str, list[Choice]]:
    """Return the rows of a model and how each may run."""
    usual = model.schedule
    slots = [replace(usual, expert_slot=slot) for slot in range(len(usual.window) + 1)]
    chunked = {c: [replace(slot, chunks=c) for slot in slots] for c in CHUNKS}
    rows: dict[str, list[Choice]] = {}
    if model.name == standard:
        rows[standard] = [Choice(usual, 1, True)]
        pipelined = [schedule for c in CHUNKS[1:] for schedule in chunked[c]]
        rows[standard + PIPELINED] = [Choice(schedule, 1, False) for schedule in pipelined]
    else:
        every = [schedule for c in CHUNKS for schedule in chunked[c]]
        rows[model.name] = [Choice(schedule, 1, False) for schedule in every]
    if two:
        halves = [schedule for c in CHUNKS_OF_HALVES for schedule in chunked[c]]
        rows[model.name + TWO] = [Choice(schedule, 2, False) for schedule in halves]
    return rows


class Simulator:
    """Steps of models on one machine. Blocks are timed once for each model."""

    def __init__(self, machine: Machine, job: Job) -> None:
        self.machine = machine
        self.job = job
        self.blocks: dict[Model, tuple[list[Block], Head]] = {}

    def step(self, model: Model, choice: Choice) -> StepTime:
        """Return the time of a step; under a load the mean over its steps."""
        if model not in self.blocks:
            self.blocks[model] = blocks_on(self.machine, model.costs, self.job.sizes)
        timed, head = self.blocks[model]
        blocks = at_schedule(timed, choice.schedule)
        setting = Setting(
            batches_in_flight=choice.batches_in_flight,
            sequential=choice.sequential,
            accumulate=self.job.accumulate,
            tax=self.machine.tax,
            longer=self.machine.halves,
            update_s=update_seconds(self.machine, model.costs, self.job.sizes),
            other_s=self.machine.other,
        )
        if model.loads is None:
            return simulate_step(blocks, setting, head)
        loads = [
            model.loads(block.schedule.chunks, layer.top_k)
            for block, layer in zip(blocks, model.costs.layers, strict=True)
        ]
        steps = [
            simulate_step(blocks, setting, head, of_blocks)
            for of_blocks in zip(*loads, strict=True)
        ]
        each_term = zip(*map(astuple, steps), strict=True)
        return StepTime(*(sum(seconds) / len(steps) for seconds in each_term))


class Plan:
    """The rows of all models, with the few best schedules of each at the profile's own values.

    A row keeps only schedules that fit the device, unless none does. fits: whether any does; None:
    the device's memory is not known.
    """

    def __init__(self, models: Sequence[Model], profile: Profile, job: Job, standard: str) -> None:
        self.profile = profile
        self.job = job
        self.standard = standard
        self.model_of: dict[str, Model] = {}
        self.choices: dict[str, list[Choice]] = {}
        self.fits: dict[str, bool | None] = {}
        nominal = Simulator(profile.machine(), job)
        for model in models:
            for row, choices in choices_of(model, standard, job.two).items():
                self.model_of[row] = model
                fitting = [choice for choice in choices if self.has_room(row, choice)]
                self.fits[row] = None if profile.memory is None else bool(fitting)
                steps = {c: nominal.step(model, c).total for c in fitting or choices}
                self.choices[row] = sorted(steps, key=lambda choice: steps[choice])[:BEST]

    def steps(self, machine: Machine, job: Job) -> dict[str, tuple[Choice, StepTime]]:
        """Return the best of each row's choices on a machine, and its step."""
        simulator = Simulator(machine, job)
        best = {}
        for row, choices in self.choices.items():
            steps = [(choice, simulator.step(self.model_of[row], choice)) for choice in choices]
            best[row] = min(steps, key=lambda each: each[1].total)
        return best

    def has_room(self, row: str, choice: Choice) -> bool:
        """Return whether a row fits the device, as far as its memory is known."""
        most = self.profile.memory
        return most is None or self.memory(row, choice) <= most

    def of_standard(self) -> list[str]:
        return self.at_best(self.standard)

    def of_shared(self) -> list[str]:
        return self.at_best(SHARED)

    def at_best(self, name: str) -> list[str]:
        """Return the rows of a model of which the best is compared: those that fit, if any does."""
        rows = [row for row, model in self.model_of.items() if model.name == name]
        return [row for row in rows if self.fits[row] is not False] or rows

    def rivals(self, row: str) -> list[str]:
        """Return the rows that a row is judged by, at the best of them: those of the standard
        model, for its own rows the sequential one."""
        is_standard = self.model_of[row].name == self.standard
        return [self.standard] if is_standard else self.of_standard()

    def over_rivals(self, totals: Mapping[str, float], row: str) -> float:
        """Return the speed-up that decides a row's answer."""
        return min(totals[name] for name in self.rivals(row)) / totals[row]

    def memory(self, row: str, choice: Choice) -> float:
        """Return the bytes of a rank at most."""
        return self.model_of[row].memory(choice.schedule.chunks, choice.batches_in_flight)

    def totals(self, machine: Machine, job: Job) -> dict[str, float]:
        return {row: step.total for row, (_, step) in self.steps(machine, job).items()}

    def drawn(self, random: Random) -> dict[str, float]:
        """Return the steps of all rows on a drawn machine, each with an error of its own."""
        totals = self.totals(self.profile.machine(self.profile.draw(random)), self.job)
        return {row: t * math.exp(random.gauss(0.0, ROW_ERROR)) for row, t in totals.items()}

    @cached_property
    def at_ends(self) -> dict[str, list[dict[str, float]]]:
        """Steps of all rows at both ends of the band of each uncertain key."""
        ends = {}
        for key, value in self.profile.values.items():
            band = BANDS[value.source]
            if band == 1 or not value.value:
                continue
            ends[key] = [
                self.totals(self.profile.machine({key: scaled(key, value.value, factor)}), self.job)
                for factor in (1 / band, band)
            ]
        return ends

    @cached_property
    def with_tokens(self) -> dict[int, dict[str, float]]:
        """Steps of all rows with more tokens of a rank, by how many times as many."""
        steps = {}
        for factor in MORE_TOKENS:
            sizes = self.job.sizes._replace(rows=self.job.sizes.rows * factor)
            steps[factor] = self.totals(self.profile.machine(), replace(self.job, sizes=sizes))
        return steps
