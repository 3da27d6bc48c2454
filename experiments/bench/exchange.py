"""`bench exchange`: flat and hierarchical All-to-All on nodes with fast links within and slow ones between.

    alone     one exchange, from launch to wait, on the slowest rank
    hidden    1 - (T - T_work) / T_alone of an exchange that is launched before work and awaited after it. The work
              sleeps WORK times as long as the exchange takes, so what is not hidden has waited for the host
    pieces    the rows as PIECES exchanges that are launched at once, as chunks are, over T_alone

All of these run in turn, round after round; ratios are taken within a round.
"""

import time
from collections.abc import Sequence
from datetime import timedelta
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table

from scmoe.experiments.bench.overlap import WITHIN, set_rates, slowest
from scmoe.experiments.engine.ranks import run_ranks
from scmoe.parallel.mesh import build_context, crosses_nodes
from scmoe.parallel.wire.all_to_all import Exchange, all_to_all
from scmoe.schedule.cost import overlap_efficiency

WAYS = ("flat", "hierarchical")
WORK, PIECES = 1.5, 4
ROW = 256  # bytes


def bench_exchange(
    nodes: int, ranks: int, between_mbit: float, kilobytes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Measure, print a table, and return the report. The caller has entered a network namespace with so many nodes.

    between_mbit: rate of a node's card; ranks have WITHIN times that to their own node. kilobytes: of one rank for one
    other rank.
    """
    given = nodes, between_mbit, tuple(kilobytes), rounds
    report = run_ranks(measure, ranks, *given, timeout_s=1200, own_links=True, nodes=nodes)[0]
    numbers = ("alone, ms", "hidden", f"{PIECES} pieces", "flat / hierarchical, [quartiles]", "auto")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    title = f"{nodes} nodes, {ranks} ranks, cards of {between_mbit:g} Mbit/s, {WITHIN} times that within a node"
    table = Table(Column("kB for each rank"), Column("exchange"), *columns, title=title, title_justify="left")
    for kb, auto in report["auto"].items():
        for way, row in ((way, report["rows"][way][kb]) for way in WAYS):
            speed = "{:.2f} [{:.2f} {:.2f}]".format(row["speedup"], *row["quartiles"])
            cells = f"{row['ms']:.2f}", f"{100 * row['hidden']:.0f} %", f"{row['pieces']:.2f}", speed
            table.add_row(kb, way, *cells, "chosen" if auto == way else "")
    Console(stderr=True, width=120).print(table)
    return {"nodes": nodes, "ranks": ranks, "between_mbit": between_mbit, "rounds": rounds, **report}


def why_no_nodes(nodes: int, ranks: int) -> str | None:
    """Return why the ranks cannot be on so many nodes, in equal numbers; None: they can."""
    if nodes > 0 and ranks % nodes == 0 and crosses_nodes(ranks, ranks // nodes):
        return None
    return f"--nodes is {nodes}, allowed: 2 or more, with equally many of the {ranks} ranks on each, 2 or more"


def measure(
    rank: int, world_size: int, nodes: int, between_mbit: float, kilobytes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Runs on every rank; the caller uses rank 0's result."""
    dist.init_process_group("gloo")
    set_rates(between_mbit, nodes)
    place = world_size, torch.device("cpu"), timedelta(seconds=300)
    says: list[str] = []
    context = build_context(*place, "auto", world_size // nodes, says.append)
    auto: Any = context.exchange
    exchanges = {"flat": all_to_all(context.ep_group), "hierarchical": auto.exchanges["hierarchical"]}
    report: dict[str, Any] = {"rows": {way: {} for way in WAYS}, "auto": {}}
    for kb in kilobytes:
        rows = torch.randn(kb * 1024 // ROW * world_size, ROW // 4)
        report["auto"][str(kb)] = auto.choose(rows, None)
        works = [WORK * median(own) for own in in_turn(rounds, rows, [(one, 0.0, 1) for one in exchanges.values()])]
        given = zip(exchanges.values(), works, strict=True)
        variants = [variant for one, work in given for variant in ((one, 0.0, 1), (one, work, 1), (one, 0.0, PIECES))]
        alone, beside, pieces = in_turn(rounds, rows, variants).reshape(len(WAYS), 3, rounds).swapaxes(0, 1)
        for i, way in enumerate(WAYS):
            speed = alone[0] / alone[i]
            report["rows"][way][str(kb)] = {
                "ms": 1e3 * median(alone[i]),
                "speedup": median(speed),
                "quartiles": quantiles(speed, n=4)[::2],
                "hidden": median(overlap_efficiency(beside[i], works[i] + alone[i], works[i])),
                "pieces": median(pieces[i] / alone[i]),
            }
    return report


def in_turn(rounds: int, rows: torch.Tensor, variants: Sequence[tuple[Exchange, float, int]]) -> Any:
    """[variants, rounds] seconds on the slowest rank. A first round, to warm up, is left out.

    variants: an exchange, the seconds of work beside it, and in how many pieces the rows go.
    """

    def seconds(exchange: Exchange, work: float, pieces: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        launched = [exchange(piece, None) for piece in rows.chunk(pieces)]
        time.sleep(work)
        for _, transfer in launched:
            transfer.wait()
        return time.perf_counter() - start

    return slowest([[seconds(*variant) for variant in variants] for _ in range(1 + rounds)])[1:].T
