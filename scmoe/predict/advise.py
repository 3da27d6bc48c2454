"""Would a shortcut pay on a cluster? Every architecture's step at its best schedule, how sure that
is, and an answer with its reason. plan.py has the rows; speed-ups are over the standard model with
sequential transfers.

Interval: SAMPLES machines are drawn within the bands of the profile's sources (profile.py), with a
fixed seed. Every row runs on the same machines, so errors that all rows share cancel in a speed-up;
each one takes the fastest of its BEST schedules on each machine. Beside that, each row has an error
of its own, with a standard deviation of ROW_ERROR: what the simulator gets wrong of one schedule
and right of another. The 5th and 95th percentile are shown.

Answer: by the speed-up over the best row that needs no other model than the standard one. It pays
if the lower end is above WORTH, does not pay if the upper end is below, and is within the error
otherwise. Rows of the standard model are compared with its sequential one. A row that does not fit
the device does not pay, and other rows are not compared with it where another one fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from scmoe.predict.plan import SHARED, Choice, Job, Model, Plan
from scmoe.predict.profile import Machine, Profile
from scmoe.predict.simulated_step import StepTime
from scmoe.predict.timed_blocks import Sizes

SAMPLES = 64
SEED = 1
WORTH = 1.02
NOTHING = 1e-6  # a difference between speed-ups that is a rounding error
LITTLE = 0.1  # a share of the step below which little can be hidden
GIB = 2**30
TIERS = {"node": "links in the node", "network": "network between nodes"}
Answer = Literal["baseline", "pays", "does not pay", "within the error"]


@dataclass(frozen=True)
class Row:
    """A row's figures. Times are in seconds, memory in bytes, ratios are speed-ups; pairs are their
    intervals. fits: whether the memory is there; None: the profile does not state it."""

    name: str
    choice: Choice
    step: StepTime
    memory: float
    fits: bool | None
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


def advise(models: Sequence[Model], profile: Profile, job: Job, standard: str) -> Advice:
    """Return the advice. models: one of them is the standard, another one may be shared_expert."""
    plan = Plan(models, profile, job, standard)
    nominal = plan.steps(profile.machine(), job)
    random = Random(SEED)
    drawn = [plan.drawn(random) for _ in range(SAMPLES)]
    totals = {row: step.total for row, (_, step) in nominal.items()}
    of_shared = plan.of_shared() or [standard]
    shared = SHARED if plan.of_shared() else standard

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
        over_shared = ratio([shared], name)
        over_best_shared = ratio(of_shared, name)
        over_best = ratio(plan.rivals(name), name)
        row = Row(
            name,
            choice,
            step,
            plan.memory(name, choice),
            plan.fits[name],
            interval([each[name] for each in drawn], step.total),
            *over_standard,
            *over_shared,
            *over_best,
            *over_best_shared,
            answer=answer_of(name, over_best[1], plan),
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


def answer_of(row: str, over_best: tuple[float, float], plan: Plan) -> Answer:
    low, high = over_best
    if row == plan.standard:
        return "baseline"
    if plan.fits[row] is False or high < WORTH:
        return "does not pay"
    return "pays" if low > WORTH else "within the error"


def tier_of(model: Model, machine: Machine, sizes: Sizes) -> str:
    """Return the tier that takes longest to carry the rows of a transfer."""
    if sizes.ep_size == 1:
        return "node"
    seconds = machine.all_to_all_bytes(1.0, sizes.sharing_experts)
    return max(seconds, key=lambda tier: seconds[tier])


# ---------------------------------------------------------------------- reasons


def reason(row: Row, advice: Advice, plan: Plan) -> str:
    """Return why a row has its answer."""
    carried = (
        f"Waiting for rows takes {advice.share:.0%} of sequential {advice.standard}'s step on the"
        f" {TIERS[advice.tier]}"
    )
    needs_no_other = plan.model_of[row.name].name == plan.standard
    rival = advice.rows[advice.standard if needs_no_other else advice.best]
    if row.answer == "baseline":
        return f"{_too_large(row, plan)}{carried}."
    if row.fits is False:
        low, high = row.over_best_interval
        times = f"{low:.2f} to {high:.2f} times as fast as {rival.name}"
        return f"{_too_large(row, plan)}With more memory it would be {times}."
    if row.answer == "pays":
        return f"{carried}. {_differences(row, rival)}.{_beside_shared(row, plan)}"
    if row.answer == "within the error":
        low, high = row.over_best_interval
        key = decisive(row.name, plan)
        decides = f"{key} decides most of this, so a (better) measurement of it helps most"
        if key is None:
            decides = (
                "no uncertain value of the profile moves it, so this is the simulator's own error"
            )
        return f"It is {low:.2f} to {high:.2f} times as fast as {rival.name}; {decides}."
    if not needs_no_other and (factor := tokens_needed(row.name, plan)):
        return (
            f"A rank has {advice.tokens:,} tokens a step. From about {factor * advice.tokens:,} on"
            f" it would be more than {WORTH} times as fast by the profile's own values, if the"
            " memory is there."
            f" {_differences(row, rival)}."
        )
    little = ", so little can be hidden" if advice.share < LITTLE else ""
    return f"{carried}{little}. {_differences(row, rival)}."


def _too_large(row: Row, plan: Plan) -> str:
    """Return what a row lacks, in words; empty where it fits."""
    room = plan.profile.memory
    if room is None or row.fits:
        return ""
    owner = "a rank" if plan.profile.precision == "32-true" else "the card"  # of CPUs, of GPUs
    return f"It needs {row.memory / GIB:.1f} GiB, {owner} has {room / GIB:.1f}. "


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
        if plan.over_rivals(totals, row) > WORTH:
            return factor
    return None


def decisive(row: str, plan: Plan) -> str | None:
    """Return the key of the profile whose band moves a row's speed-up most; None: none moves it."""
    moved = {}
    for key, ends in plan.at_ends.items():
        low, high = (plan.over_rivals(totals, row) for totals in ends)
        if abs(high - low) > NOTHING:
            moved[key] = abs(high - low)
    return max(moved, key=lambda key: moved[key], default=None)
