"""`bench exchange`: flat and hierarchical All-to-All on nodes with fast links within and slow ones
between.

    alone     one exchange, from launch to wait, on the slowest rank
    hidden    1 - (T - T_work) / T_alone of an exchange that is launched before work and awaited
              after it. The work sleeps WORK times as long as the exchange takes, so what is not
              hidden has waited for the host
    pieces    the rows as PIECES exchanges that are launched at once, as chunks are, over T_alone

All of these run in turn, round after round; ratios are taken within a round.
"""

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from experiments.bench.overlap import WITHIN, set_rates
from experiments.engine.clock import CPU, in_turn, middle, quartiles
from experiments.engine.ranks import run_ranks
from scmoe.parallel.mesh import build_context
from scmoe.parallel.wire.all_to_all import Exchange
from scmoe.report import Report
from scmoe.schedule.cost import overlap_efficiency

WAYS = ("flat", "hierarchical")
WORK, PIECES = 1.5, 4
ROW = 256  # bytes


def bench_exchange(
    nodes: int, ranks: int, between_mbit: float, kilobytes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Measure, print a table, and return the report. The caller has entered a network namespace
    with so many nodes.

    between_mbit: rate of a node's card; ranks have WITHIN times that to their own node. kilobytes:
    of one rank for one other rank.
    """
    args = nodes, between_mbit, kilobytes, rounds
    found = run_ranks(measure, ranks, *args, timeout_s=1200, own_links=True, nodes=nodes)[0]
    report = {
        "nodes": nodes,
        "ranks": ranks,
        "between_mbit": between_mbit,
        "rounds": rounds,
        **found,
    }
    rows = {}
    for kb, auto in report["auto"].items():
        for way in WAYS:
            rows[f"{kb}, {way}"] = {
                **report["rows"][way][kb],
                "auto": "chosen" if auto == way else "",
            }
    columns = {
        "alone, ms": "{ms:.2f}",
        "hidden": "{hidden:.0%}",
        f"{PIECES} pieces": "{pieces:.2f}",
        "flat / hierarchical, [quartiles]": "{speedup:.2f} [{quartiles[0]:.2f} {quartiles[1]:.2f}]",
        "auto": "{auto}",
    }
    title = "{nodes} nodes, {ranks} ranks, cards of {between_mbit:g} Mbit/s, ".format(**report)
    Report(
        f"{title}{WITHIN} times that within a node", rows, columns, "kB for each rank, exchange"
    ).show()
    return report


def why_no_nodes(nodes: int, ranks: int) -> str | None:
    """Return why the ranks cannot be on so many nodes, in equal numbers; None: they can."""
    if nodes > 1 and ranks % nodes == 0 and ranks > nodes:
        return None
    return (
        f"--nodes is {nodes}, allowed: 2 or more, with equally many of the {ranks} ranks on each, 2"
        " or more"
    )


def measure(
    rank: int,
    world_size: int,
    nodes: int,
    between_mbit: float,
    kilobytes: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    """Runs on every rank; the caller uses rank 0's result."""
    dist.init_process_group("gloo")
    set_rates(between_mbit, nodes)
    context: Any = build_context(world_size, CPU, timedelta(seconds=300))
    auto: Any = context.exchange
    report: dict[str, Any] = {"rows": {way: {} for way in WAYS}, "auto": {}}
    for kb in kilobytes:
        rows = torch.randn(kb * 1024 // ROW * world_size, ROW // 4)
        report["auto"][str(kb)] = auto.choose(rows, None)
        alone = {way: partial(seconds, one, rows) for way, one in auto.exchanges.items()}
        work = {
            way: WORK * middle(own) for way, own in in_turn(alone, rounds, over_ranks=True).items()
        }
        runs = {}
        for way, one in auto.exchanges.items():
            runs[way, "alone"] = alone[way]
            runs[way, "beside"] = partial(seconds, one, rows, work=work[way])
            runs[way, "pieces"] = partial(seconds, one, rows, pieces=PIECES)
        times = in_turn(runs, rounds, over_ranks=True)
        for way in WAYS:
            own = times[way, "alone"]
            speed = times["flat", "alone"] / own
            report["rows"][way][str(kb)] = {
                "ms": 1e3 * middle(own),
                "speedup": middle(speed),
                "quartiles": quartiles(speed),
                "hidden": middle(
                    overlap_efficiency(times[way, "beside"], work[way] + own, work[way])
                ),
                "pieces": middle(times[way, "pieces"] / own),
            }
    return report


def seconds(exchange: Exchange, rows: torch.Tensor, work: float = 0.0, pieces: int = 1) -> float:
    """Return the seconds of an exchange on this rank. work: seconds of work beside it. pieces: in
    which the rows go."""
    dist.barrier()
    start = time.perf_counter()
    launched = [exchange(piece, None) for piece in rows.chunk(pieces)]
    time.sleep(work)
    for _, transfer in launched:
        transfer.wait()
    return time.perf_counter() - start
