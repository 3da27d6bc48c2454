"""What a row of `bench overlap` gains over the best of other models: of top-2 in any schedule, and
of all rows without a shortcut.

    over_best_without_another_model    over top-2: sequential, in chunks, with two batches in flight
    over_best_without_shortcut         over these and the shared expert's rows

Which rows are compared depends on which rows are measured, so each ratio names its best.
"""

from typing import Any

import numpy as np

from experiments.bench.overlap import Measured, Seconds, way_of
from experiments.bench.pairs import Setting

KINDS = ("forward", "train")
OVER_BEST = {
    "over_best_without_another_model": ("top2",),
    "over_best_without_shortcut": ("top2", "shared_expert"),
}


def over_best(setting: Setting, found: Measured, row: str) -> dict[str, dict[str, Any]]:
    """Return both comparisons of a row: for forward and train the ratio, its median over rounds,
    with its quartiles, and the name of the best. A row has one schedule, the best in training."""
    own = found.times[found.rows[row].best]
    return {
        key: {kind: _over(own, rivals_of(setting, found, blocks), kind) for kind in KINDS}
        for key, blocks in OVER_BEST.items()
    }


def rivals_of(setting: Setting, found: Measured, blocks: tuple[str, ...]) -> dict[str, Seconds]:
    """Return the times of sequential top-2, and of the best schedule of each row of these
    blocks."""
    rivals = {"top2, sequential": way_of(found, "top2", "sequential")}
    for name, row in found.rows.items():
        if setting.block_of(name) in blocks:
            rivals[name] = found.times[row.best]
    return rivals


def _over(own: Seconds, rivals: dict[str, Seconds], kind: str) -> dict[str, Any]:
    medians = {name: np.median(getattr(seconds, kind)) for name, seconds in rivals.items()}
    best = min(medians, key=lambda name: medians[name])
    ratios = np.asarray(getattr(rivals[best], kind) / getattr(own, kind))
    first, median, third = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [first, third], "best": best}
