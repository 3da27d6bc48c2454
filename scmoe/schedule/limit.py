"""A lower bound on the time of an iteration whose links also carry gradients: only waits that cannot be avoided count.

    forward     computation beside the rows' transfers
    backward    computation beside the rows' and the gradients' transfers; a gradient is there when it is computed
    update      needs all gradients

A schedule may not reach the bound: here a transfer of rows can start at any time of its direction (forward, backward),
and all computation of this direction can hide it.
"""

from collections.abc import Iterable


def in_parallel(computation: float, transfers: Iterable[tuple[float, float]]) -> float:
    """Return the shortest time in which a computation and all transfers can end; the transfers take turns on one link.

    transfers: for each, its earliest start, counted from the start of the computation, and its duration.
    """
    end, after = computation, 0.0
    for ready, duration in sorted(transfers, reverse=True):
        after += duration  # the link carries all of this after `ready`
        end = max(end, ready + after)
    return end


def least_time(
    forward: float, backward: float, update: float, rows: float, gradients: Iterable[tuple[float, float]]
) -> float:
    """Return the least time of an iteration. forward, backward, update: computation alone. rows: time of the transfers
    of a direction. gradients: when in backward each can start, and how long its sum over the ranks takes."""
    return max(forward, rows) + in_parallel(backward, [(0.0, rows), *gradients]) + update
