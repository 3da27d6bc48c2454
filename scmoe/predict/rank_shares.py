"""A load (loads.py) as the timelines take it: the rows of each chunk and rank over the even
ones."""

from collections.abc import Sequence
from functools import cache

from scmoe.loads import Load as Routing
from scmoe.loads import Sizes, counts_of
from scmoe.predict.plan import LoadOf
from scmoe.schedule.play import Load, shares

STEPS = 8  # of a load that are played at most; those of a recording are spread over all of it
TOKENS = 2048  # of a rank that are dealt: shares do not depend on their number


def rank_shares(routing: Routing, sizes: Sizes) -> LoadOf | None:
    """Return the load of each of a number of steps, in so many chunks; None: no rows travel.

    sizes: their top_k counts where a caller asks for no other one.
    """
    if sizes.ranks == 1:
        return None

    @cache
    def in_chunks(chunks: int, top_k: int | None = None) -> Sequence[Load]:
        routed = sizes._replace(top_k=top_k or sizes.top_k)
        loads = []
        for step in range(min(STEPS, routing.phases(sizes.ranks))):
            counts_PRE = counts_of(routing, routed, [TOKENS] * sizes.ranks, step, chunks)
            rows_PRR = counts_PRE.unflatten(2, (sizes.ranks, -1)).sum(3).tolist()
            loads.append([shares(rows_RR) for rows_RR in rows_PRR])
        return loads

    return in_chunks
