"""Would a shortcut pay on a cluster? A verdict in three steps, each over the one before:

    two_batches      the standard model at its best, over the same with sequential transfers
    shared_expert    a model with a shared expert at its best, over the standard one at its best
    shortcut         the best shortcut, over a shared expert at its best

At its best: with the EP, slot, chunks and batches in flight of advised_rows.py. The sequential
model has its own best EP too, so a step says what is left to gain after EP was chosen well.

Interval: the error of predictions of measured speed-ups (docs/would-it-pay.md). All errors are
those of a logarithm. On other people's clusters, the error was at most CELL_ERROR in 90 % of the
cells; on the testbed, whose own operators were measured, at most MEASURED_ERROR. A speed-up comes
from waiting that is hidden. If the faster of two rows waits less by only a small share of the
slower one's step, the error is smaller: ROW_ERROR + HIDDEN_ERROR x share. If a rank has fewer than
FEW_TOKENS in a batch, launches and latency decide, which no measurement checks; then up to
FEW_ERROR is added.

Answer: a step pays if the lower end is above WORTH, does not pay if the upper end is below, and is
within the error otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scmoe.predict.advised_rows import (
    AS_IT_IS,
    SHARED,
    AdvisedRow,
    Simulator,
    Slowdown,
    best_rows,
    rows_of,
)
from scmoe.predict.cluster import Profile
from scmoe.predict.compared_models import Model
from scmoe.predict.judged_job import Job

ROW_ERROR = 0.02
CELL_ERROR = 0.23
MEASURED_ERROR = 0.06
HIDDEN_ERROR = 2.0
FEW_TOKENS = 4096
FEW_ERROR = 0.3
WORTH = 1.02
LITTLE = 0.1  # a share of the step below which little can be hidden
Answer = Literal["pays", "does not pay", "within the error"]


class Errors(NamedTuple):
    """Errors of a speed-up's logarithm, with 90 %. few_tokens: what few tokens add. most: the
    limit of the rest."""

    few_tokens: float
    most: float


@dataclass(frozen=True)
class VerdictStep:
    """A step of the verdict. value: a speed-up; interval: where it is with 90 %. row: the faster
    one. over: the slower one."""

    value: float
    interval: tuple[float, float]
    row: str
    over: str

    @property
    def answer(self) -> Answer:
        low, high = self.interval
        if high < WORTH:
            return "does not pay"
        return "pays" if low > WORTH else "within the error"


@dataclass(frozen=True)
class Advice:
    """rows: the standard model, sequential, first. verdict: the three steps. to_do: one sentence.
    standard: the first row's name."""

    rows: Mapping[str, AdvisedRow]
    verdict: Mapping[str, VerdictStep]
    to_do: str
    standard: str


def advise(
    models: Sequence[Model],
    profile: Profile,
    job: Job,
    scales: Sequence[Slowdown] = (AS_IT_IS,),
    operators_measured: bool = False,
) -> Advice:
    """Return the advice. models: the standard one first. scales: what a measurement says of the
    machine; of several, each is possible, the first one most. operators_measured: computing and
    transfers were measured apart."""
    standard = models[0].name
    each_rows = [
        best_rows(models, Simulator(profile.machine(), job, scale), profile.memory)
        for scale in scales
    ]
    few = FEW_ERROR * max(0.0, 1 - tokens_of_batch(models[0], job) / FEW_TOKENS)
    errors = Errors(few, MEASURED_ERROR if operators_measured else CELL_ERROR)
    verdicts = [verdict_of(rows, standard, errors) for rows in each_rows]
    verdict = {
        name: VerdictStep(
            step.value,
            (
                min(each[name].interval[0] for each in verdicts),
                max(each[name].interval[1] for each in verdicts),
            ),
            step.row,
            step.over,
        )
        for name, step in verdicts[0].items()
    }
    rows = each_rows[0]
    return Advice(rows, verdict, what_to_do(rows, verdict, standard, profile, job), standard)


def tokens_of_batch(model: Model, job: Job) -> float:
    """Return the tokens, or patches, that a rank routes in a batch."""
    return model.costs.tokens * job.sizes.rows / job.sizes.tensor_parallel


def verdict_of(
    rows: Mapping[str, AdvisedRow], standard: str, errors: Errors
) -> dict[str, VerdictStep]:
    """Return the three steps."""
    tiers = {
        "two_batches": rows_of(rows, [standard]),
        "shared_expert": rows_of(rows, [SHARED]),
        "shortcut": rows_of(rows, [row.model.name for row in rows.values() if is_shortcut(row)]),
    }
    before = standard
    verdict = {}
    for name, tier in tiers.items():
        best = min(tier, key=lambda row: tier[row].total)
        verdict[name] = step_of(rows, best, before, errors)
        before = best
    return verdict


def is_shortcut(row: AdvisedRow) -> bool:
    return row.model.schedule.architecture in ("scmoe", "farskip")


def step_of(rows: Mapping[str, AdvisedRow], row: str, over: str, errors: Errors) -> VerdictStep:
    value = rows[over].total / rows[row].total
    return VerdictStep(value, interval(rows[over], rows[row], errors), row, over)


def interval(slower: AdvisedRow, faster: AdvisedRow, errors: Errors) -> tuple[float, float]:
    """Return where a speed-up is with 90 %."""
    value = slower.total / faster.total
    if slower is faster:
        return value, value
    hidden = abs(slower.step.exposed_rows - faster.step.exposed_rows) / slower.total
    width = errors.few_tokens + min(errors.most, ROW_ERROR + HIDDEN_ERROR * hidden)
    return value * math.exp(-width), value * math.exp(width)


def what_to_do(
    rows: Mapping[str, AdvisedRow],
    verdict: Mapping[str, VerdictStep],
    standard: str,
    profile: Profile,
    job: Job,
) -> str:
    """Return one sentence: what to do first, for the job as given."""
    if all(row.fits is False for row in rows.values()):
        return (
            "Make it fit first: fewer samples with more batches of a step, more ranks, or"
            " trainer.recompute=true."
        )
    first = rows[standard]
    chosen = standard
    paying = []
    for name, step in verdict.items():
        if step.answer == "pays" and rows[step.row].total < rows[chosen].total:
            chosen = step.row
            paying.append(name)
    ep_size = rows[chosen].choice.ep_size
    node = profile.ranks_per_node
    inside = node < job.sizes.ranks and node % ep_size == 0
    where = f"Keep EP {ep_size} in the node" if inside else f"Use EP {ep_size}"
    if ep_size == 1:
        where = "Keep all experts on each rank (EP 1)" if len(job.ep_sizes) > 1 else "EP is 1"
    steps = {name: step.answer for name, step in verdict.items()}
    if not paying:
        if "within the error" in steps.values() and first.waits >= LITTLE:
            return (
                f"{where} and measure a step: ranks wait for rows in {first.waits:.0%} of it by"
                " this prediction, and measured_step_ms=MS or measured=FILE decides what it is"
                " worth to hide that."
            )
        because = "so little is to gain" if first.waits < LITTLE else "but no way hides it"
        return f"{where}: ranks wait for rows in {first.waits:.0%} of a step, {because}."
    advice = []
    if "two_batches" in paying:
        row = rows[verdict["two_batches"].row]
        advice.append(f"run the standard model {row.choice.batches.in_a_sentence}")
    if "shared_expert" in paying:
        advice.append("replace one routed copy by a shared expert, if its quality is as good")
    if "shortcut" in paying:
        advice.append(f"take the shortcut {verdict['shortcut'].row}")
    return f"{where}; {'; '.join(advice)}."
