"""Rows of the benches that run with two batches in flight, which hides transfers without a shortcut
and without another model.

    NAME_two              the halves of a rank's batch take turns, in one chunk each
    NAME_two_pipelined    the same, in two chunks each

Nothing here imports torch, so the command line reads it.
"""

from collections.abc import Mapping

from scmoe.config.leaves import ConfigError
from scmoe.predict.row_names import PIPELINED, TWO, architecture_of, batches_of

Rows = Mapping[str, tuple[str, tuple[int, ...]]]  # as pairs.ROWS of one kind of blocks


def rows_in_halves(rows: Rows) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each row in one chunk the two rows with two batches in flight."""
    in_halves: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row, (block, _) in rows.items():
        if not row.endswith(PIPELINED):
            in_halves[row + TWO] = block, (1,)
            in_halves[row + TWO + PIPELINED] = block, (2,)
    return in_halves


def over_best_top2(speedups: Mapping[str, float], *others: float) -> dict[str, float]:
    """Return each row's speed-up divided by that of the fastest top-2. speedups: medians over one
    baseline. others: speed-ups of top-2 that no row has; 1.0 where the baseline is sequential
    top-2."""
    of_top2 = [speedup for row, speedup in speedups.items() if architecture_of(row) == "top2"]
    fastest = max([*of_top2, *others])
    return {row: speedup / fastest for row, speedup in speedups.items()}


def stated_or_of_medians(
    stated: Mapping[str, float | None], speedups: Mapping[str, float]
) -> dict[str, float]:
    """Return what each row gains over the best of top-2's rows: medians of the rounds' ratios as a
    report states them, or ratios of medians where its version did not. speedups: over sequential
    top-2."""
    gains = {row: gain for row, gain in stated.items() if gain is not None}
    return gains if len(gains) == len(speedups) else over_best_top2(speedups, 1.0)


def refuse_halves(rows: tuple[str, ...], sequences: int) -> None:
    """Raise ConfigError for rows whose batches have no halves.

    sequences: of a rank in one batch.
    """
    for row in rows:
        if batches_of(row) == 2 and sequences < 2:
            raise ConfigError(
                f"--rows has {row}, which halves a batch of one sequence. Give more --tokens or a"
                " shorter --seq-len."
            )
