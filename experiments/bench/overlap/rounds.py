"""The measurement of `bench overlap` on one rank: a row of blocks under every schedule, on links
whose rate gives a share of communication.

    share of communication   s = 1 - T_free / T_sequential, forward, of a standard top-2 row; hiding
                             all communication speeds the row up by 1 / (1 - s) at most
    rounds                   all variants in turn, then again; ratios are taken within a round
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from experiments.bench.pairs import ROWS, default_schedule
from experiments.bench.rank_bench import Bench, VariantTimes
from experiments.bench.rate_search import find_rate
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant, between_and_inside, chosen_by
from experiments.engine.ranks import say_once
from scmoe.loads import BALANCED
from scmoe.planning.choice import ModelChoice
from scmoe.planning.clock import median
from scmoe.predict.row_names import TWO, batches_of
from scmoe.schedule.cost import slots

TRIALS = 3  # of each schedule
# up to FINALISTS schedules of a row go into the rounds: within NEAR_BEST of the best in the trials
NEAR_BEST = 1.03
FINALISTS = 3


class PlannedRow(NamedTuple):
    """One row at one load. choice: the planner's. chosen: its variant. finalists: the variants of
    the rounds, with the best one. peak_mb: memory of a step. dropped: share of copies; None where
    no uneven load is measured. one_batch_peak_mb: memory of a step at the same schedule with one
    batch in flight; None where the row has no more. auto: what `schedule=auto` runs, which chooses
    the number of batches in flight too; None where the row with two was not asked for.
    """

    choice: ModelChoice
    chosen: Variant
    finalists: Sequence[Variant]
    best: Variant
    peak_mb: float
    dropped: float | None = None
    one_batch_peak_mb: float | None = None
    auto: Variant | None = None


class Measurement(NamedTuple):
    """What was measured at one load. rate: Bench.set_rate's, None without one. times: of each
    variant, of all loads. gradients: by block (Bench.gradients). iterations: timed in all."""

    setting: Setting
    rate: float | None
    rows: Mapping[str, PlannedRow]
    times: Mapping[Variant, VariantTimes]
    gradients: Mapping[str, Sequence[tuple[float, int]]]
    iterations: int
    load: str = BALANCED


def block_seconds(
    measured: Measurement, block: str, transfers: str, load: str | None = None
) -> VariantTimes:
    """Return the times of a block's default schedule. load: None: that of `measured`."""
    return measured.times[Variant(block, default_schedule(block), transfers, load or measured.load)]


def measure(rank: int, world_size: int, setting: Setting) -> dict[str, Measurement]:
    """Return what was measured at each load, the balanced one first. Every rank must call it; the
    caller uses rank 0's result.

    Each round measures the best schedules of each row, the planner's choice, and each block
    sequential and free. Trials and planning warm all of them up. The best of a row is the best by
    its rounds, because a trial is too short to separate schedules with similar times; its times
    are `best_times`."""
    dist.init_process_group("gloo")
    bench = Bench(setting)
    has_rate = setting.links != "loopback"
    rate = find_rate(setting, bench.set_rate, bench.infer) if has_rate else None
    candidates = {
        (load, row): candidates_of(setting, load, row)
        for load, row in product(bench.inputs, setting.rows)
    }
    everything = chain.from_iterable(candidates.values())
    tried = bench.rounds(everything, TRIALS, "trying every schedule: ")
    if rate is not None:  # the machine's speed has drifted since the search
        rate = find_rate(setting, bench.set_rate, bench.infer, rate)
    autos = {key: auto_variant(bench, *key) for key in candidates if key[1] + TWO in setting.rows}
    # The first row at the balanced load is planned last, right before the rounds: operators that
    # were timed long before them do not explain them.
    choices = {key: plan(bench, *key) for key in reversed(candidates)}
    chosen = {
        (load, row): chosen_by(choices[load, row], setting.block_of(row), load)
        for load, row in candidates
    }
    finalists = {key: finalists_of(candidates[key], chosen[key], tried) for key in candidates}
    variants_of_rounds = chain(references_of(bench), *finalists.values(), autos.values())
    times = bench.rounds(variants_of_rounds, setting.rounds)
    rows: dict[str, dict[str, PlannedRow]] = {load: {} for load in bench.inputs}
    for (load, row), variants in finalists.items():
        best = fastest(variants, times)
        dropped = bench.dropped(best) if setting.loads else None
        in_one_batch = replace(best, batches_in_flight=1)
        rows[load][row] = PlannedRow(
            choices[load, row],
            chosen[load, row],
            variants,
            best,
            bench.peak_mb(best),
            dropped,
            None if in_one_batch == best else bench.peak_mb(in_one_batch),
            autos.get((load, row)),
        )
    gradients = {block: bench.gradients(block) for block in bench.stacks}
    return {
        load: Measurement(setting, rate, rows_of_load, times, gradients, bench.iterations, load)
        for load, rows_of_load in rows.items()
    }


def best_times(finalists: Sequence[Variant], times: Mapping[Variant, VariantTimes]) -> VariantTimes:
    """Return the times of the best schedule of a row. Half of the rounds choose the schedule that
    the other half times, and in turn: one that some rounds choose as the best was also lucky in
    them, the more so the more schedules there are."""
    chosen_by_even = fastest(finalists, times, slice(0, None, 2))
    chosen_by_odd = fastest(finalists, times, slice(1, None, 2))
    is_even = np.arange(len(times[chosen_by_even].train)) % 2 == 0
    pairs = zip(times[chosen_by_odd], times[chosen_by_even], strict=True)
    return VariantTimes(*(np.where(is_even, in_even, in_odd) for in_even, in_odd in pairs))


def fastest(
    finalists: Sequence[Variant], times: Mapping[Variant, VariantTimes], rounds: slice = slice(None)
) -> Variant:
    """Return the variant with the fastest training step in these rounds."""
    return min(finalists, key=lambda v: median(times[v].train[rounds]))


def candidates_of(setting: Setting, load: str, row: str) -> list[Variant]:
    """Return a row at a load at every schedule that it can have."""
    block, chunk_counts = ROWS[setting.every][row]
    default = default_schedule(block)
    schedules = chain.from_iterable(
        slots(replace(default, chunks=chunks)) for chunks in chunk_counts
    )
    return [
        Variant(block, schedule, load=load, batches_in_flight=batches_of(row))
        for schedule in schedules
    ]


def plan(bench: Bench, load: str, row: str) -> ModelChoice:
    """Return the planner's choice for a row at a load."""
    say_once(f"planning {row}" + (f" at {load}" if bench.setting.loads else ""))
    block, chunk_counts = ROWS[bench.setting.every][row]
    return bench.choose(block, chunk_counts, load, (batches_of(row),))


def auto_variant(bench: Bench, load: str, row: str) -> Variant:
    """Return what `schedule=auto` runs of a row at a load: the planner chooses between one and two
    batches in flight too."""
    block, chunk_counts = ROWS[bench.setting.every][row]
    return chosen_by(bench.choose(block, chunk_counts, load, (1, 2)), block, load)


def finalists_of(
    candidates: Sequence[Variant], chosen: Variant, tried: Mapping[Variant, VariantTimes]
) -> list[Variant]:
    """Return the variants of a row that go into the rounds: the best by the trials, the planner's,
    and the best between operators and inside attention."""
    best_of_each = [nearest(kind, tried)[0] for kind in between_and_inside(candidates)]
    return [*nearest(candidates, tried), chosen, *best_of_each]


def references_of(bench: Bench) -> Iterator[Variant]:
    """Yield what rows are compared with: each block at each load without overlap, and without
    transfers; and top-2 in halves without transfers, if it is a row and another one has two batches
    in flight."""
    kinds = ["sequential", "free"]
    if bench.setting.level == "iteration":
        kinds.append("alone")
    for load, block, transfers in product(bench.inputs, bench.stacks, kinds):
        yield Variant(block, default_schedule(block), transfers, load)
    rows = bench.setting.rows
    if "top2" in rows and any(batches_of(row) == 2 for row in rows):
        yield in_halves(bench.setting.level)


def in_halves(level: str) -> Variant:
    """Return balanced top-2 with two batches in flight and without transfers: what halved products
    cost."""
    transfers = "alone" if level == "iteration" else "free"
    return Variant("top2", default_schedule("top2"), transfers, batches_in_flight=2)


def nearest(variants: Sequence[Variant], tried: Mapping[Variant, VariantTimes]) -> list[Variant]:
    """Return the variants whose steps were within NEAR_BEST of the best in the trials,
    FINALISTS at most."""
    seconds = {v: min(tried[v].train) for v in variants}  # a disturbance only makes a trial longer
    ranked = sorted(variants, key=lambda v: seconds[v])
    return [v for v in ranked[:FINALISTS] if seconds[v] <= NEAR_BEST * seconds[ranked[0]]]
