"""What a row of `bench overlap` gains over the best of other models: of top-2 in any schedule, and
of all rows without a shortcut.

    over_best_without_another_model    over top-2: sequential, in chunks, with two batches in flight
    over_best_without_shortcut         over these and the shared expert's rows

Which rows are compared depends on which rows are measured, so each ratio names its best.
"""

from collections.abc import Mapping
from typing import Any

from experiments.bench.overlap.overlap import Measured, block_seconds
from experiments.bench.overlap_rows import Kind
from experiments.bench.pairs import Setting
from experiments.bench.rank_bench import Seconds
from scmoe.planning.clock import median, quartiles

KINDS: tuple[Kind, ...] = ("forward", "train")
OVER_BEST = {
    "over_best_without_another_model": ("top2",),
    "over_best_without_shortcut": ("top2", "shared_expert"),
}


def over_best(setting: Setting, measured: Measured, row: str) -> dict[str, Any]:
    """Return both comparisons of a row: for forward and train the ratio, its median over rounds,
    with its quartiles, and the name of the best. A row has one schedule, the best in training."""
    seconds = measured.times[measured.rows[row].best]
    comparisons = {}
    for name, blocks in OVER_BEST.items():
        rivals = rivals_of(setting, measured, blocks)
        comparisons[name] = {kind: over_rivals(seconds, rivals, kind) for kind in KINDS}
    return comparisons


def rivals_of(setting: Setting, measured: Measured, blocks: tuple[str, ...]) -> dict[str, Seconds]:
    """Return the times of sequential top-2, and of the best schedule of each row of these
    blocks."""
    rivals = {"top2, sequential": block_seconds(measured, "top2", "sequential")}
    for name, row in measured.rows.items():
        if setting.block_of(name) in blocks:
            rivals[name] = measured.times[row.best]
    return rivals


def over_rivals(seconds: Seconds, rivals: dict[str, Seconds], kind: Kind) -> dict[str, Any]:
    """Return the time of the fastest rival over that of a row."""
    times = {name: times_of(rival, kind) for name, rival in rivals.items()}
    return over_fastest(times_of(seconds, kind), times)


def over_fastest(seconds: Any, rivals: Mapping[str, Any]) -> dict[str, Any]:
    """Return the time of the fastest rival over `seconds`: the median over rounds, its quartiles,
    and the rival's name. seconds, rivals: arrays over rounds."""
    best = min(rivals, key=lambda name: median(rivals[name]))
    ratios = rivals[best] / seconds
    return {"median": median(ratios), "quartiles": quartiles(ratios), "best": best}


def times_of(seconds: Seconds, kind: Kind) -> Any:
    """Return the times of a forward pass or of a training step in each round."""
    return seconds.forward if kind == "forward" else seconds.train
