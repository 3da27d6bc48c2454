"""The figures of one row of `bench overlap`: its best schedule beside sequential top-2, beside what
the planner has chosen, and beside the best of other models.

    over_best_without_another_model    over top-2: sequential, in chunks, with two batches in flight
    over_best_without_shortcut         over these and the shared expert's rows

Which rows are compared depends on which rows are measured, so each ratio names its best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.bench.overlap.limits import (
    gradient_mb,
    has_limit,
    least_times,
    rows_over_gradients,
)
from experiments.bench.overlap.rounds import (
    Measurement,
    PlannedRow,
    best_times,
    block_seconds,
    fastest,
)
from experiments.bench.rank_bench import VariantTimes
from experiments.bench.row import KINDS, Kind, Row
from experiments.bench.stacks import Variant, between_and_inside
from scmoe.planning.clock import median, quartiles
from scmoe.predict.row_names import TWO
from scmoe.schedule.cost import overlap_efficiency

OVER_BEST = {
    "over_best_without_another_model": ("top2",),
    "over_best_without_shortcut": ("top2", "shared_expert"),
}


def measured_row(measured: Measurement, name: str) -> Row:
    """Return the figures of a row: its best schedule beside all that it is compared with."""
    setting = measured.setting
    row, block = measured.rows[name], setting.block_of(name)
    schedule, chosen = row.best.schedule, row.chosen.schedule
    best = best_times(row.finalists, measured.times)
    top2 = block_seconds(measured, "top2", "sequential")
    sequential = block_seconds(measured, block, "sequential")
    free = block_seconds(measured, block, "free")
    forward, train = top2.forward / best.forward, top2.train / best.train
    figures = Row(
        forward_ms=1e3 * median(best.forward),
        train_ms=1e3 * median(best.train),
        forward_speedup=median(forward),
        train_speedup=median(train),
        forward_quartiles=quartiles(forward),
        train_quartiles=quartiles(train),
        overlap_forward=median(overlap_efficiency(best.forward, sequential.forward, free.forward)),
        overlap_backward=median(
            overlap_efficiency(best.backward, sequential.backward, free.backward)
        ),
        slot=schedule.slot,
        inside_attention=schedule.inside_attention,
        chunks=schedule.chunks,
        auto_slot=chosen.slot,
        auto_inside_attention=chosen.inside_attention,
        inside_gain=inside_gain(row, measured.times),
        auto_chunks=chosen.chunks,
        auto_over_best=over_best_finalist(row.chosen, row.finalists, measured.times),
        auto_of_both=auto_of_both(measured, name),
        batches_in_flight=row.best.batches_in_flight,
        peak_mb=row.peak_mb,
        peak_over_one_batch=(
            None if row.one_batch_peak_mb is None else row.peak_mb / row.one_batch_peak_mb
        ),
        links=setting.links,
        compute=setting.compute,
        **over_best(measured, name),
    )
    if setting.every == 1:  # Nous' first block has a shorter window
        figures = replace(figures, auto_slots=[each.place for each in row.choice.schedule.blocks])
    if setting.level == "iteration":
        figures = replace(
            figures,
            gradient_mb=gradient_mb(measured, block),
            rows_over_gradients=rows_over_gradients(measured, block),
        )
    if has_limit(measured):
        least = least_times(measured, block)
        figures = replace(
            figures, limit_train=median(top2.train / least), of_limit=median(least / best.train)
        )
    return figures


def inside_gain(row: PlannedRow, times: Mapping[Variant, VariantTimes]) -> dict[str, Any] | None:
    """Return what experts inside attention gain: the time of the row's best schedule between
    operators over that of its best one inside, as quartiles with the median between them. None: the
    window has no attention.
    """
    kinds = between_and_inside(row.finalists)
    if len(kinds) < 2:
        return None
    between, inside = (fastest(kind, times) for kind in kinds)
    of_between, of_inside = (best_times(kind, times) for kind in kinds)
    return {
        "forward": all_quartiles(of_between.forward / of_inside.forward),
        "train": all_quartiles(of_between.train / of_inside.train),
        "between": f"{between.schedule.place} x {between.schedule.chunks}",
        "inside": f"{inside.schedule.place} x {inside.schedule.chunks}",
    }


def all_quartiles(values: Any) -> list[float]:
    """Return the quartiles with the median between them."""
    first, third = quartiles(values)
    return [first, median(values), third]


def over_best(measured: Measurement, row: str) -> dict[str, Any]:
    """Return both comparisons of a row: for forward and train the ratio, its median over rounds,
    with its quartiles, and the name of the best. A row has one schedule, the best in training."""
    seconds = best_times(measured.rows[row].finalists, measured.times)
    comparisons = {}
    for name, blocks in OVER_BEST.items():
        rivals = rivals_of(measured, blocks)
        comparisons[name] = {kind: over_rivals(seconds, rivals, kind) for kind in KINDS}
    return comparisons


def rivals_of(measured: Measurement, blocks: tuple[str, ...]) -> dict[str, VariantTimes]:
    """Return the times of sequential top-2, and of the best schedule of each row of these
    blocks."""
    rivals = {"top2, sequential": block_seconds(measured, "top2", "sequential")}
    for name, row in measured.rows.items():
        if measured.setting.block_of(name) in blocks:
            rivals[name] = best_times(row.finalists, measured.times)
    return rivals


def over_rivals(
    seconds: VariantTimes, rivals: dict[str, VariantTimes], kind: Kind
) -> dict[str, Any]:
    """Return the time of the fastest rival over that of a row."""
    times = {name: round_times(rival, kind) for name, rival in rivals.items()}
    return over_fastest(round_times(seconds, kind), times)


def over_fastest(seconds: Any, rivals: Mapping[str, Any]) -> dict[str, Any]:
    """Return the time of the fastest rival over `seconds`: the median over rounds, its quartiles,
    and the rival's name. seconds, rivals: arrays over rounds."""
    best = min(rivals, key=lambda name: median(rivals[name]))
    ratios = rivals[best] / seconds
    return {"median": median(ratios), "quartiles": quartiles(ratios), "best": best}


def round_times(seconds: VariantTimes, kind: Kind) -> Any:
    """Return the times of a forward pass or of a training step in each round."""
    return seconds.forward if kind == "forward" else seconds.train


def auto_of_both(measured: Measurement, name: str) -> dict[str, Any] | None:
    """Return what `schedule=auto` has chosen between one and two batches in flight, and its
    training time over that of the best of both rows. None: no row with two was measured."""
    row = measured.rows[name]
    if row.auto is None:
        return None
    finalists = [*row.finalists, *measured.rows[name + TWO].finalists]
    return {
        "batches_in_flight": row.auto.batches_in_flight,
        "schedule": f"{row.auto.schedule.place} x {row.auto.schedule.chunks}",
        "over_best": over_best_finalist(row.auto, finalists, measured.times),
    }


def over_best_finalist(
    choice: Variant, finalists: Sequence[Variant], times: Mapping[Variant, VariantTimes]
) -> float:
    """Return the training time of a planner's choice over that of the best schedule. It may be
    below 1, as other rounds choose the best schedule (rounds.best_times)."""
    return median(times[choice].train / best_times(finalists, times).train)
