"""The All-to-All over two levels of network: first between nodes, then within the node.

    (n, p): the rank at place p of node n                           messages of a rank
    hop 1   (n, p) -> (m, p)   all rows for node m                  nodes - 1, over the slow links
    hop 2   (m, p) -> (m, q)   all rows from place p for place q    places - 1, over the fast links

A flat All-to-All sends (nodes - 1) x places messages over the slow links, and the same bytes. So
two hops win where rows are few and a message's own cost counts, and lose the time of hop 2 where
rows are many. In this order the slow links are busy from the launch on, and hop 2 of one chunk runs
beside hop 1 of the next (docs/decisions/0038-nodes.md). Rows are only moved, so results are
bit-identical to those of a flat exchange. The way back of a gradient is an exchange like any other,
with the numbers of rows transposed. With `strategy.exchange: auto` the first exchange of a run
decides by measurement whether rows take one hop or two.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Traffic
from scmoe.parallel.wire import all_to_all
from scmoe.parallel.wire.all_to_all import Exchange, Work, buffer_for

Blocks = list[list[int]]


class Hops(NamedTuple):
    """Numbers of rows that a rank holds before, between and after the hops, in blocks in the order
    of the rows."""

    first: Blocks  # [receiver's node][receiver's place]
    between: (
        Blocks  # [sender's node][receiver's place]: from ranks at this place, to ranks of this node
    )
    last: Blocks  # [sender's place][sender's node]: as they arrive


def hops_of(by_rank: Tensor, rank: int, places: int) -> Hops:
    """by_rank: rows by [sender, receiver]. Ranks are numbered node by node, each of `places` ranks."""
    by_place = by_rank.view(len(by_rank) // places, places, -1, places)
    node, place = divmod(rank, places)
    blocks = by_place[node, place], by_place[:, place, node], by_place[:, :, node, place].T
    return Hops(*(block.tolist() for block in blocks))


def equal_hops(num_rows: int, nodes: int, places: int) -> Hops:
    """Return the hops if each rank holds num_rows rows and sends the same number to every rank."""
    n = num_rows // (nodes * places)
    return Hops([[n] * places] * nodes, [[n] * places] * nodes, [[n] * nodes] * places)


def swap_blocks(rows: Tensor, blocks: Blocks, out: Tensor | None = None) -> Tensor:
    """Transpose a matrix of blocks: the blocks come row by row and are returned column by column.

    blocks: the matrix; an entry is the number of tensor rows in its block.
    """
    width = len(blocks[0])
    pieces = rows.split([size for row in blocks for size in row])
    return torch.cat([piece for b in range(width) for piece in pieces[b::width]], out=out)


def row_sums(blocks: Blocks) -> list[int]:
    return [sum(row) for row in blocks]


def column_sums(blocks: Blocks) -> list[int]:
    return [sum(column) for column in zip(*blocks, strict=True)]


def hierarchical(within: Any, between: Any) -> Exchange:
    """The exchange of the ranks of several nodes. No caller waits between the hops.

    within: the group of this node's ranks. between: the group of the ranks at this place of all
    nodes.
    """
    places, nodes = dist.get_world_size(within), dist.get_world_size(between)
    rank = dist.get_rank(between) * places + dist.get_rank(within)
    two_hops = over_gloo if dist.get_backend(within) == "gloo" else OverNccl()

    def exchange(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        hops = (
            hops_of(traffic.by_rank, rank, places)
            if traffic
            else equal_hops(len(rows), nodes, places)
        )
        target = buffer_for(rows, traffic)
        met = rows.new_empty((sum(row_sums(hops.between)), *rows.shape[1:]))
        return target, two_hops(target, met, rows, hops, within, between)

    return exchange


def over_gloo(
    target: Tensor, met: Tensor, rows: Tensor, hops: Hops, within: Any, between: Any
) -> Work:
    """A thread waits for the first hop and posts the second: gloo's works have no callbacks. It is
    not the thread that posts the first hops: that of the next exchange must not wait for this one's
    rows."""
    arrived = torch.empty_like(target)
    first = all_to_all.point_to_point(
        met, rows, row_sums(hops.between), row_sums(hops.first), between
    )

    def second() -> list[Any]:
        first.wait()
        regrouped = swap_blocks(met, hops.between)
        return all_to_all.post(
            arrived, regrouped, row_sums(hops.last), column_sums(hops.between), within
        )

    posted = all_to_all.thread("second-hop").submit(second)
    return all_to_all.Posted(posted, partial(swap_blocks, arrived, hops.last, target))


class OverNccl:
    """Each hop has a stream, which waits for its rows and regroups them, so that the first hop of
    an exchange does not wait for the second hop of the one before. The host waits for nothing."""

    def __init__(self) -> None:
        self.first, self.second = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)

    def __call__(
        self, target: Tensor, met: Tensor, rows: Tensor, hops: Hops, within: Any, between: Any
    ) -> Work:
        arrived = torch.empty_like(target)
        self.first.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.first):
            received, sent = row_sums(hops.between), row_sums(hops.first)
            all_to_all.collective(met, rows, received, sent, between).wait()
            regrouped = swap_blocks(met, hops.between)
        self.second.wait_stream(self.first)
        with torch.cuda.stream(self.second):
            received, sent = row_sums(hops.last), column_sums(hops.between)
            all_to_all.collective(arrived, regrouped, received, sent, within).wait()
            swap_blocks(arrived, hops.last, target)
        met.record_stream(
            self.first
        )  # the memory of these is another stream's; the caller keeps target and rows
        for buffer in (regrouped, arrived):
            buffer.record_stream(self.second)
        return self.second.record_event()  # `wait` makes the current stream wait, not the host


ROUNDS = 5  # after a first one, which may have to connect the ranks


class FastestExchange:
    """Takes the exchange that was the fastest for the rows of the first call. All of them give
    bit-identical rows.

    exchanges: by name. group: all ranks of the job, over gloo. They measure at the same time,
    because groups of ranks share the network, and use the same exchange. say: is given one line
    with the choice and the times.
    """

    def __init__(
        self, exchanges: Mapping[str, Exchange], group: Any, say: Callable[[str], None]
    ) -> None:
        self.exchanges, self.group, self.say = exchanges, group, say
        self.chosen: str | None = None

    def __call__(self, rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        if self.chosen is None:
            self.chosen = self.choose(rows, traffic)
        return self.exchanges[self.chosen](rows, traffic)

    def choose(self, rows: Tensor, traffic: Traffic | None) -> str:
        rounds = [
            [self.seconds(name, rows, traffic) for name in self.exchanges]
            for _ in range(1 + ROUNDS)
        ]
        slowest = torch.tensor(
            [median(own[1:]) for own in zip(*rounds, strict=True)], dtype=torch.float64
        )
        dist.all_reduce(slowest, dist.ReduceOp.MAX, self.group)
        seconds = dict(zip(self.exchanges, slowest.tolist(), strict=True))
        chosen = min(seconds, key=lambda name: seconds[name])
        times = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
        self.say(
            f"strategy.exchange: {chosen} ({times} for {rows.nbytes / 1e3:.4g} kB of rank 0's first"
            " rows)"
        )
        return chosen

    def seconds(self, name: str, rows: Tensor, traffic: Traffic | None) -> float:
        if rows.is_cuda:
            torch.cuda.synchronize()
        dist.barrier(self.group)
        start = time.perf_counter()
        _, work = self.exchanges[name](rows, traffic)
        work.wait()
        if rows.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start
