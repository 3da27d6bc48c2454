"""Rows of the benches that run with two batches in flight: the rival of a shortcut that changes no
model.

    NAME_two              the halves of a rank's batch take turns, in one chunk each
    NAME_two_pipelined    the same, in two chunks each

Nothing here imports torch, so the command line reads it.
"""

from collections.abc import Mapping

TWO, PIPELINED = "_two", "_pipelined"
Rows = Mapping[str, tuple[str, tuple[int, ...]]]  # as pairs.ROWS of one kind of blocks


def rows_in_halves(rows: Rows) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each row in one chunk the two rows with two batches in flight."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row, (block, _) in rows.items():
        if not row.endswith(PIPELINED):
            found[row + TWO] = block, (1,)
            found[row + TWO + PIPELINED] = block, (2,)
    return found


def batches_of(row: str) -> int:
    """Return the batches in flight of a row."""
    return 2 if row.removesuffix(PIPELINED).endswith(TWO) else 1


def architecture_of(row: str) -> str:
    """Return the row of the same blocks in one chunk, with one batch in flight."""
    return row.removesuffix(PIPELINED).removesuffix(TWO)


def why_no_halves(rows: tuple[str, ...], sequences: int) -> str | None:
    """Return why rows cannot have halves; None: they can, or none has two batches in flight.

    sequences: of a rank in one batch."""
    in_halves = [row for row in rows if batches_of(row) == 2]
    if not in_halves or sequences >= 2:
        return None
    return (
        f"--rows has {in_halves[0]}, which halves a batch of one sequence. Give more --tokens or a"
        " shorter --seq-len"
    )
