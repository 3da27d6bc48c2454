"""Would a shortcut pay on a cluster? Every architecture's step at its best schedule, how sure that
is, and an answer with its reason.

    top2              standard, sequential transfers: speed-ups are over it
    top2_pipelined    the same model in chunks
    NAME_two          any model with two batches in flight
    the others        overlapped, at the best slot and chunks

Interval: SAMPLES machines are drawn within the bands of the profile's sources (profile.py), with a
fixed seed. Every row runs on the same machines, so errors that all rows share cancel in a speed-up;
each one takes the fastest of its BEST schedules on each machine. Beside that, each row has an error
of its own, with a standard deviation of ROW_ERROR: what the simulator gets wrong of one schedule
and right of another. The 5th and 95th percentile are shown.

Answer: by the speed-up over the best row that needs no other model than the standard one. It pays
if the lower end is above WORTH, does not pay if the upper end is below, and is within the error
otherwise. Rows of the standard model are compared with its sequential one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from random import Random
from typing import Literal, NamedTuple

from scmoe.clusters.operator_costs import Costs
from scmoe.clusters.played_load import Load
from scmoe.clusters.profile import BANDS, Machine, Profile, scaled
from scmoe.clusters.simulated_step import Block, Head, Setting, StepTime, simulate_step
from scmoe.clusters.timed_blocks import Sizes, at_schedule, blocks_on, update_seconds
from scmoe.schedule.schedule import Schedule

CHUNKS = (1, 2, 4, 8)
CHUNKS_OF_HALVES = (1, 2)
SAMPLES = 64
BEST = 4  # schedules of a row that are played on every drawn machine
SEED = 1
ROW_ERROR = 0.02  # assumed
WORTH = 1.02
LITTLE = 0.1  # a share of the step below which little can be hidden
MORE_TOKENS = (2, 4, 8, 16, 32, 64)  # times as many, of which the first that pays is named
PIPELINED = "_pipelined"
TWO = "_two"
SHARED = "shared_expert"
TIERS = {"node": "links in the node", "network": "network between nodes"}
Answer = Literal["baseline", "pays", "does not pay", "within the error"]
LoadOf = Callable[[int], Sequence[Load]]
"""Returns the load of each of a number of steps, in so many chunks."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model to be compared. name: of its architecture. schedule: of the blocks that have it.
    memory: bytes of a rank. loads: of its rows; None: even."""

    name: str
    costs: Costs
    schedule: Schedule
    memory: float
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


@dataclass(frozen=True)
class Row:
    """A row's figures. Times are in seconds, ratios speed-ups; pairs are their intervals."""

    name: str
    choice: Choice
    step: StepTime
    memory: float
    step_interval: tuple[float, float]
    over_standard: float
    over_standard_interval: tuple[float, float]
    over_shared: float
    over_shared_interval: tuple[float, float]
    over_best: float
    over_best_interval: tuple[float, float]
    over_best_shared: float
    over_best_shared_interval: tuple[float, float]
    answer: Answer
    why: str


@dataclass(frozen=True)
class Advice:
    """rows: the standard model, sequential, first. best: the row that needs no other model. tier:
    that carries the rows. share: of the standard step in which ranks wait for rows."""

    rows: Mapping[str, Row]
    standard: str
    best: str
    tier: str
    share: float
    tokens: int


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
        loads = {c: model.loads(c) for c in {block.schedule.chunks for block in blocks}}
        num_steps = len(loads[choice.schedule.chunks])
        steps = [
            simulate_step(blocks, setting, head, [loads[b.schedule.chunks][i] for b in blocks])
            for i in range(num_steps)
        ]
        each_term = zip(*map(astuple, steps), strict=True)
        return StepTime(*(sum(seconds) / num_steps for seconds in each_term))


class Plan:
    """The rows of all models, with the few best schedules of each at the profile's own values."""

    def __init__(self, models: Sequence[Model], profile: Profile, job: Job, standard: str) -> None:
        self.profile = profile
        self.job = job
        self.standard = standard
        self.model_of: dict[str, Model] = {}
        self.choices: dict[str, list[Choice]] = {}
        nominal = Simulator(profile.machine(), job)
        for model in models:
            for row, choices in choices_of(model, standard, job.two).items():
                steps = {choice: nominal.step(model, choice).total for choice in choices}
                self.model_of[row] = model
                self.choices[row] = sorted(steps, key=lambda choice: steps[choice])[:BEST]

    def steps(self, machine: Machine, job: Job) -> dict[str, tuple[Choice, StepTime]]:
        """Return the best of each row's choices on a machine, and its step."""
        simulator = Simulator(machine, job)
        best = {}
        for row, choices in self.choices.items():
            steps = [(choice, simulator.step(self.model_of[row], choice)) for choice in choices]
            best[row] = min(steps, key=lambda each: each[1].total)
        return best

    def of_standard(self) -> list[str]:
        return [row for row, model in self.model_of.items() if model.name == self.standard]

    def of_shared(self) -> list[str]:
        return [row for row, model in self.model_of.items() if model.name == SHARED]

    def over_best(self, totals: Mapping[str, float], row: str) -> float:
        """Return a row's speed-up over the best one of the standard model."""
        return min(totals[name] for name in self.of_standard()) / totals[row]

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


def advise(models: Sequence[Model], profile: Profile, job: Job, standard: str) -> Advice:
    """Return the advice. models: one of them is the standard, another one may be shared_expert."""
    plan = Plan(models, profile, job, standard)
    nominal = plan.steps(profile.machine(), job)
    random = Random(SEED)
    drawn = [plan.drawn(random) for _ in range(SAMPLES)]
    totals = {row: step.total for row, (_, step) in nominal.items()}
    of_shared = plan.of_shared() or [standard]

    def ratio(rows: Sequence[str], row: str) -> tuple[float, tuple[float, float]]:
        ratios = [min(each[name] for name in rows) / each[row] for each in drawn]
        nominal_ratio = min(totals[name] for name in rows) / totals[row]
        return nominal_ratio, interval(ratios, nominal_ratio)

    best = min(plan.of_standard(), key=lambda row: totals[row])
    machine = profile.machine()
    tier = tier_of(plan.model_of[standard], machine, job.sizes)
    share = nominal[standard][1].exposed_rows / totals[standard]
    tokens = round(plan.model_of[standard].costs.tokens * job.sizes.rows * job.accumulate)
    rows = {}
    for name, (choice, step) in nominal.items():
        over_standard = ratio([standard], name)
        over_shared = ratio(of_shared[:1], name)
        over_best_shared = ratio(of_shared, name)
        needs_no_other = name in plan.of_standard()
        over_best = ratio([standard] if needs_no_other else plan.of_standard(), name)
        row = Row(
            name,
            choice,
            step,
            plan.model_of[name].memory,
            interval([each[name] for each in drawn], step.total),
            *over_standard,
            *over_shared,
            *over_best,
            *over_best_shared,
            answer="baseline" if name == standard else answer_of(over_best[1]),
            why="",
        )
        rows[name] = row
    advice = Advice(rows, standard, best, tier, share, tokens)
    with_reasons = {name: replace(row, why=reason(row, advice, plan)) for name, row in rows.items()}
    return replace(advice, rows=with_reasons)


def interval(values: Sequence[float], nominal: float) -> tuple[float, float]:
    """Return the 5th and the 95th percentile, or the value of the profile itself if it is beyond
    one of them."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return min(ordered[round(0.05 * last)], nominal), max(ordered[round(0.95 * last)], nominal)


def answer_of(over_best: tuple[float, float]) -> Answer:
    low, high = over_best
    if low > WORTH:
        return "pays"
    return "does not pay" if high < WORTH else "within the error"


def tier_of(model: Model, machine: Machine, sizes: Sizes) -> str:
    """Return the tier that takes longest to carry the rows of a transfer."""
    if sizes.ep_size == 1:
        return "node"
    seconds = machine.all_to_all_bytes(1.0, sizes.ep_size)
    return max(seconds, key=lambda tier: seconds[tier])


# ---------------------------------------------------------------------- reasons


def reason(row: Row, advice: Advice, plan: Plan) -> str:
    """Return why a row has its answer."""
    carried = (
        f"Waiting for rows takes {advice.share:.0%} of sequential {advice.standard}'s step on the"
        f" {TIERS[advice.tier]}"
    )
    needs_no_other = row.name in plan.of_standard()
    rival = advice.rows[advice.standard if needs_no_other else advice.best]
    if row.answer == "baseline":
        return f"{carried}."
    if row.answer == "pays":
        return f"{carried}. {_differences(row, rival)}.{_beside_shared(row, plan)}"
    if row.answer == "within the error":
        low, high = row.over_best_interval
        key = decisive(row.name, plan)
        decides = f"{key} decides most of this, so a (better) measurement of it helps most"
        if key is None:
            decides = "no value of the profile is uncertain, so this is the simulator's own error"
        return f"It is {low:.2f} to {high:.2f} times as fast as {rival.name}; {decides}."
    if not needs_no_other and (factor := tokens_needed(row.name, plan)):
        return (
            f"A rank has {advice.tokens:,} tokens a step. From about {factor * advice.tokens:,} on"
            f" it would be more than {WORTH} times as fast by the profile's own values."
            f" {_differences(row, rival)}."
        )
    little = ", so little can be hidden" if advice.share < LITTLE else ""
    return f"{carried}{little}. {_differences(row, rival)}."


def _beside_shared(row: Row, plan: Plan) -> str:
    """Return what a row gains over shared-expert, which has as many weights, in words."""
    model = plan.model_of[row.name].name
    if model in (plan.standard, SHARED, "top1") or not plan.of_shared():
        return ""
    low, high = row.over_best_shared_interval
    return f" Over {SHARED} at its best it is {low:.2f} to {high:.2f} times as fast."


def _differences(row: Row, rival: Row) -> str:
    """Return in which terms a row's step differs from that of another one, in words."""
    terms = {
        "computing": row.step.computing - rival.step.computing,
        "waiting for rows": row.step.exposed_rows - rival.step.exposed_rows,
        "gradients and update": row.step.exposed_gradients
        + row.step.update
        - rival.step.exposed_gradients
        - rival.step.update,
        "slowed by transfers": row.step.slowed - rival.step.slowed,
    }
    total = row.step.total - rival.step.total
    ordered = sorted(terms, key=lambda term: -abs(terms[term]))
    words = ", ".join(
        f"{term} {1e3 * terms[term]:+.3g}"
        for term in ordered
        if abs(terms[term]) > 0.05 * abs(total)
    )
    return f"Its step differs from that of {rival.name} by {1e3 * total:+.3g} ms: {words}"


def tokens_needed(row: str, plan: Plan) -> int | None:
    """Return how many times as many tokens of a rank make a row pay, at the profile's own values;
    None: MORE_TOKENS do not."""
    for factor, totals in plan.with_tokens.items():
        if plan.over_best(totals, row) > WORTH:
            return factor
    return None


def decisive(row: str, plan: Plan) -> str | None:
    """Return the key of the profile whose band moves a row's speed-up most; None: no key has a
    band."""
    moved = {}
    for key, ends in plan.at_ends.items():
        low, high = (plan.over_best(totals, row) for totals in ends)
        moved[key] = abs(high - low)
    return max(moved, key=lambda key: moved[key], default=None)
