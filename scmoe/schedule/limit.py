"""The least time of an iteration on links that carry gradients too: nothing waits that does not have to.

    forward     computation beside the rows' transfers
    backward    computation beside the rows' and the gradients' transfers; a gradient is there when it is computed
    update      needs all gradients

A schedule need not reach it: transfers of rows may start at any time of a direction here, and each hides behind all of
its computation.
"""

from collections.abc import Iterable


def in_parallel(computation: float, transfers: Iterable[tuple[float, float]]) -> float:
    """Return the least time in which a computation and transfers end that take turns on one link.

    transfers: when each can start, since the computation's start, and how long it takes.
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
