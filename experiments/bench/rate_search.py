"""The rate of the links, or of a GPU's bus, at which communication has the wanted share of
sequential top-2.
"""

import math
from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from experiments.bench.pairs import default_schedule
from experiments.bench.setting import Setting, share_sent
from experiments.bench.stacks import Variant
from experiments.engine.ranks import say_once
from scmoe.planning.clock import in_turn, median
from scmoe.report import say

# at each rate; with fewer, the error at a share of 0.15 is as large as the time of the transfers
SEARCH_ROUNDS = 15
MAX_FACTOR_FROM_ESTIMATE = 8.0  # of a searched rate
MAX_FACTOR_FROM_LAST_ROUND = 2.0
FAR_FROM_SHARE = 0.05  # difference between the measured and the wanted share of communication


def warn_of_share(wanted: float | None, measured: float) -> None:
    """Warn if the measured share of communication is far from the one that was searched for."""
    if wanted is not None and abs(measured - wanted) > FAR_FROM_SHARE:
        say(
            f"warning: the communication share is {measured:.2f}, but {wanted:g} was asked for. The"
            f" result is that of {measured:.2f}. Measure again with other work stopped, or give"
            " other sizes."
        )


def find_rate(
    s: Setting,
    set_rate: Callable[[float], None],
    infer: Callable[[Variant], float],
    start: float | None = None,
) -> float:
    """Set the rate and return it: the given one, or the one at which communication is the wanted
    share of sequential top-2.

    set_rate: as Bench.set_rate. infer: returns the seconds of a forward pass of top-2. start: the
    rate at which the search begins; None: an estimate.
    """
    if s.link_mbit is not None:
        set_rate(s.link_mbit)
        return s.link_mbit
    sequential, free = (
        Variant("top2", default_schedule("top2"), transfers) for transfers in ("sequential", "free")
    )
    runs = {variant: partial(infer, variant) for variant in (sequential, free)}
    wanted, rate = s.share, 1.0 if start is None else start
    if start is None and s.links != "bus":
        t_free = median(in_turn({free: runs[free]}, SEARCH_ROUNDS, over_ranks=True)[free])
        rows = 2 * 2 * s.moe_blocks * s.tokens * s.rows_per_copy(top_k=2)
        sent_bits = rows * s.dim * 32 * share_sent(dist.get_world_size())
        rate = sent_bits / (t_free * wanted / (1 - wanted)) / 1e6
    # transfers below the links' burst take no time at any rate, so their search would not converge
    widest = MAX_FACTOR_FROM_ESTIMATE if start is None else MAX_FACTOR_FROM_LAST_ROUND
    least, most = (0.0, math.inf) if s.links == "bus" else (rate / widest, rate * widest)
    for _ in range(8):
        set_rate(rate)
        times = in_turn(runs, SEARCH_ROUNDS, over_ranks=True)
        share = median(1 - times[free] / times[sequential])
        where = (
            f"bus at {rate:.3g} of its rate" if s.links == "bus" else f"links at {rate:.0f} Mbit/s"
        )
        say_once(f"{where}: communication share {share:.3f}, wanted {wanted:g}")
        if abs(share - wanted) < 0.01:
            break
        factor = share / (1 - share) / (wanted / (1 - wanted))
        # one disturbed measurement must not bring the rate near zero
        rate *= min(2.0, max(0.5, factor))
        rate = min(most, max(least, rate))
    else:
        set_rate(rate)
    return rate
