"""The load of the ranks in a step that is played (simulated_step.py): which ranks decide, and how
much longer transfers and experts take than with even rows.
"""

from collections.abc import Mapping, Sequence

from scmoe.schedule.cost import Share

Load = Sequence[Sequence[Share]]  # of each chunk and rank


def busiest(times: Mapping[str, float], load: Load) -> dict[str, float]:
    """Return the times of a pass in which every transfer and all experts take as long as those of
    the busiest rank in its busiest chunk."""
    sent = max(max(share.sent, share.received) for chunk in load for share in chunk)
    computed = max(share.computed for chunk in load for share in chunk)
    factors = {"dispatch": sent, "combine": sent, "experts": computed}
    return {operator: t * factors.get(operator, 1.0) for operator, t in times.items()}


def dominant(load: Load) -> list[list[Share]]:
    """Return the load of those ranks that may be the slowest. A rank that has at most as many rows
    as another one, of each kind and in each chunk, is never later."""
    ranks = list(dict.fromkeys(zip(*load, strict=True)))
    numbers = [[number for share in rank for number in share] for rank in ranks]
    kept = [
        rank
        for rank, mine in zip(ranks, numbers, strict=True)
        if not any(
            other is not mine and all(a <= b for a, b in zip(mine, other, strict=True))
            for other in numbers
        )
    ]
    return [list(chunk) for chunk in zip(*kept, strict=True)]
