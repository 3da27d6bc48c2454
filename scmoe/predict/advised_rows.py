"""The rows of an advice: each model with the number of ranks that share the experts (EP), the slot,
the chunks and the batches in flight that fit the device and make its step the shortest.

    top2              standard, sequential transfers
    top2_pipelined    the same model in chunks
    NAME_two          standard, or a shared expert, with two batches in flight
    the others        overlapped; a shortcut with one batch in flight or two

Two batches in flight are of both kinds of batches.py. Slots between two operators are tried, none
inside an attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from scmoe.predict.batches import InFlight
from scmoe.predict.cluster_rates import Machine
from scmoe.predict.compared_models import Model
from scmoe.predict.judged_job import Job
from scmoe.predict.row_names import PIPELINED, TWO
from scmoe.predict.shared_link import Sum
from scmoe.predict.simulated_step import (
    Block,
    Head,
    StepSetting,
    StepTime,
    simulate_forward,
    simulate_step,
)
from scmoe.predict.timed_blocks import blocks_on, reschedule, update_seconds
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.play import TRANSFERS, Load
from scmoe.schedule.schedule import Schedule

CHUNKS = (1, 2, 4)
CHUNKS_OF_TWO = (1, 2)  # with two batches in flight
SHARED = "shared_expert"
COMPARED_BLOCKS = 6  # blocks, spread over the model, with which choices are compared
KEPT = 2  # choices of a row and EP that are played with all blocks


class Slowdown(NamedTuple):
    """How much longer computing, transfers and the host's fixed time take than the machine's values
    say (measured_times.py)."""

    computing: float = 1.0
    transfers: float = 1.0
    host: float = 1.0


AS_IT_IS = Slowdown()


class Choice(NamedTuple):
    """How a row may run."""

    ep_size: int
    schedule: Schedule
    batches: InFlight = InFlight.ONE
    sequential: bool = False


@dataclass(frozen=True)
class AdvisedRow:
    """A row at its best choice. memory: bytes of a rank at most; None: not known. fits: whether
    that is there; None: not known."""

    model: Model
    choice: Choice
    step: StepTime
    memory: float | None
    fits: bool | None

    @property
    def total(self) -> float:
        return self.step.total

    @property
    def waits(self) -> float:
        """Of the step: the share in which ranks wait for rows."""
        return self.step.exposed_rows / self.total


def ways_of(model: Model, is_standard: bool, job: Job, ep_size: int) -> dict[str, list[Choice]]:
    """Return the rows of a model and how each may run with so many ranks that share the experts."""
    usual = model.schedule
    slots = [replace(usual, expert_slot=slot) for slot in range(len(usual.window) + 1)]
    chunks = CHUNKS if ep_size > 1 else (1,)  # without transfers they only cost

    def one(counts: Sequence[int]) -> list[Choice]:
        return [Choice(ep_size, replace(slot, chunks=n)) for n in counts for slot in slots]

    kinds = []
    if ep_size > 1 and job.samples > 1:
        kinds.append(InFlight.HALVES)
    if ep_size > 1 and job.accumulate > 1:
        kinds.append(InFlight.WHOLE)
    two = [
        Choice(ep_size, replace(slot, chunks=n), batches)
        for batches in kinds
        for n in CHUNKS_OF_TWO
        for slot in slots
    ]
    if is_standard:
        rows = {model.name: [Choice(ep_size, usual, sequential=True)]}
        rows[model.name + PIPELINED] = one(chunks[1:])
        rows[model.name + TWO] = two
    elif model.name == SHARED:
        rows = {model.name: one(chunks), model.name + TWO: two}
    else:
        rows = {model.name: [*one(chunks), *two]}
    return {row: choices for row, choices in rows.items() if choices}


class Simulator:
    """Steps of models on one machine. Blocks are timed once for each model and EP."""

    def __init__(self, machine: Machine, job: Job, scale: Slowdown = AS_IT_IS) -> None:
        self.machine = machine
        self.job = job
        self.scale = scale
        self.timed: dict[tuple[Model, int], tuple[list[Block], Head]] = {}

    def step(self, model: Model, choice: Choice, few: bool = False) -> StepTime:
        """Return the time of a step, or of a forward pass; under a load the mean over its steps.
        few: of some blocks only."""
        blocks, head = self.blocks(model, choice.ep_size)
        blocks = reschedule(blocks, choice.schedule)
        top_ks = [layer.top_k for layer in model.costs.layers]
        if few:
            spread = [
                round(i * (len(blocks) - 1) / (COMPARED_BLOCKS - 1)) for i in range(COMPARED_BLOCKS)
            ]
            blocks = [blocks[index] for index in dict.fromkeys(spread)]
            top_ks = [top_ks[index] for index in dict.fromkeys(spread)]
        loads_in = model.loads(choice.ep_size)
        if loads_in is None:
            return self.run(blocks, head, model, choice, None)
        loads = [
            loads_in(block.schedule.chunks, top_k)
            for block, top_k in zip(blocks, top_ks, strict=True)
        ]
        steps = [self.run(blocks, head, model, choice, each) for each in zip(*loads, strict=True)]
        each_term = zip(*map(astuple, steps), strict=True)
        return StepTime(*(sum(seconds) / len(steps) for seconds in each_term))

    def run(
        self,
        blocks: Sequence[Block],
        head: Head,
        model: Model,
        choice: Choice,
        loads: Sequence[Load] | None,
    ) -> StepTime:
        machine = self.machine
        setting = StepSetting(
            batches=choice.batches,
            sequential=choice.sequential,
            accumulate=self.job.accumulate,
            stages=self.job.sizes.stages,
            virtual_stages=self.job.sizes.virtual_stages,
            tax=machine.tax,
            longer=machine.halves,
            update_s=update_seconds(machine, model.costs, self.job.at(choice.ep_size)),
            other_s=machine.other,
        )
        if self.job.prefill:
            return simulate_forward(blocks, setting, head, loads)
        return simulate_step(blocks, setting, head, loads)

    def blocks(self, model: Model, ep_size: int) -> tuple[list[Block], Head]:
        key = model, ep_size
        if key not in self.timed:
            # the host's time is a part of computing, and gets that factor below
            fixed = self.machine.fixed * self.scale.host / self.scale.computing
            machine = replace(self.machine, fixed=fixed)
            blocks, head = blocks_on(machine, model.costs, self.job.at(ep_size))
            unique = {id(block): scaled_block(block, self.scale) for block in blocks}
            by = self.scale.computing
            sums = [slower(each, self.scale) for each in head.sums]
            head = Head(by * head.forward, by * head.backward, sums)
            self.timed[key] = [unique[id(block)] for block in blocks], head
        return self.timed[key]


def slower(each: Sum, scale: Slowdown) -> Sum:
    return each._replace(seconds=scale.transfers * each.seconds)


def scaled_block(block: Block, scale: Slowdown) -> Block:
    """Return a block whose computing and transfers take longer by these factors."""

    def scaled(times: OperatorTimes) -> OperatorTimes:
        forward, backward = (
            {
                operator: seconds * (scale.transfers if operator in TRANSFERS else scale.computing)
                for operator, seconds in each.items()
            }
            for each in (times.forward, times.backward)
        )
        return OperatorTimes(forward, backward)

    return replace(
        block,
        times=scaled(block.times),
        fixed=scaled(block.fixed),
        least=scaled(block.least),
        sums=[slower(each, scale) for each in block.sums],
        gathers=scale.transfers * block.gathers,
    )


def best_rows(
    models: Sequence[Model], simulator: Simulator, most: float | None
) -> dict[str, AdvisedRow]:
    """Return each row at its best choice. models: the standard one first. most: bytes that a rank
    may use; None: not known. A choice that fits is better than one that does not."""
    rows: dict[str, AdvisedRow] = {}
    for name, tried in tried_rows(models, simulator, most):
        best = rows.get(name)
        if best is None or (tried.fits is False, tried.total) < (best.fits is False, best.total):
            rows[name] = tried
    return rows


def tried_rows(
    models: Sequence[Model], simulator: Simulator, most: float | None
) -> Iterator[tuple[str, AdvisedRow]]:
    """Yield every row in every way that it may run."""
    job = simulator.job
    for model in models:
        for ep_size in job.ep_sizes:
            for name, choices in ways_of(model, model is models[0], job, ep_size).items():
                for choice, memory, fits in shortlist(model, choices, simulator, most):
                    step = simulator.step(model, choice)
                    yield name, AdvisedRow(model, choice, step, memory, fits)


def shortlist(
    model: Model, choices: Sequence[Choice], simulator: Simulator, most: float | None
) -> list[tuple[Choice, float | None, bool | None]]:
    """Return the best choices, judged by a few blocks, those that fit first; each with its memory
    and whether it fits."""
    tried = []
    for choice in choices:
        memory = memory_of_row(model, choice, simulator.job)
        fits = None if memory is None or most is None else memory <= most
        tried.append(
            (fits is False, simulator.step(model, choice, few=True).total, choice, memory, fits)
        )
    tried.sort(key=lambda each: each[:2])
    return [each[2:] for each in tried[:KEPT]]


def memory_of_row(model: Model, choice: Choice, job: Job) -> float | None:
    """Return the bytes of a rank at most; None: the job has what no estimate knows."""
    if not job.knows_memory:
        return None
    return model.memory(choice.ep_size, choice.schedule.chunks, choice.batches)


def rows_of(rows: Mapping[str, AdvisedRow], names: Sequence[str]) -> dict[str, AdvisedRow]:
    """Return the rows of some models: those that fit, if any does."""
    chosen = {name: row for name, row in rows.items() if row.model.name in names}
    fitting = {name: row for name, row in chosen.items() if row.fits is not False}
    return fitting or chosen
