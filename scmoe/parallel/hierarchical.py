"""The All-to-All over two levels of network: first within the node, then between nodes.

    (n, p): the rank at place p of node n                     messages of a rank
    hop 1   (n, p) -> (n, q)   all rows for places q          places - 1, over the fast links
    hop 2   (n, q) -> (m, q)   all rows of node n             nodes - 1, over the slow links

A flat All-to-All sends (nodes - 1) x places messages over the slow links, and the same bytes. So two hops win where
rows are few and a message's own cost counts, and lose the time of hop 1 where rows are many. Of the two orders this one
leaves nothing to do on arrival: hop 2 receives rows in the order of their senders (docs/decisions/0038-two-levels.md).
Rows are only moved, so results are bit-identical to those of a flat exchange. The way back of a gradient is an exchange
like any other, with the numbers of rows transposed.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Traffic
from scmoe.parallel import all_to_all
from scmoe.parallel.all_to_all import Exchange, Work, buffer_for

Blocks = list[list[int]]


class Hops(NamedTuple):
    """Numbers of rows that a rank holds before, between and after the hops, in blocks in the order of the rows."""

    first: Blocks  # [receiver's node][receiver's place]
    between: Blocks  # [sender's place][receiver's node]: of this node's ranks, for this place
    last: Blocks  # [sender's node][sender's place]


def hops_of(by_rank: Tensor, rank: int, places: int) -> Hops:
    """by_rank: rows by [sender, receiver]. Ranks are numbered node by node, each of `places` ranks."""
    by_place = by_rank.view(len(by_rank) // places, places, -1, places)
    node, place = divmod(rank, places)
    blocks = by_place[node, place], by_place[node, :, :, place], by_place[:, :, node, place]
    return Hops(*(block.tolist() for block in blocks))


def equal_hops(num_rows: int, nodes: int, places: int) -> Hops:
    """The hops of num_rows rows of each rank, as many for each."""
    n = num_rows // (nodes * places)
    return Hops([[n] * places] * nodes, [[n] * nodes] * places, [[n] * places] * nodes)


def swap_blocks(rows: Tensor, blocks: Blocks) -> Tensor:
    """Rows in blocks [a][b], of so many rows each, in the order [b][a]."""
    width = len(blocks[0])
    pieces = rows.split([size for row in blocks for size in row])
    return torch.cat([piece for b in range(width) for piece in pieces[b::width]])


def row_sums(blocks: Blocks) -> list[int]:
    return [sum(row) for row in blocks]


def column_sums(blocks: Blocks) -> list[int]:
    return [sum(column) for column in zip(*blocks, strict=True)]


def hierarchical(within: Any, between: Any) -> Exchange:
    """The exchange of the ranks of several nodes.

    within: the group of this node's ranks. between: the group of the ranks at this place of all nodes.
    `wait` is that of the second hop. No caller waits between the hops: with gloo a thread does, with NCCL a stream.
    """
    places, nodes = dist.get_world_size(within), dist.get_world_size(between)
    rank = dist.get_rank(between) * places + dist.get_rank(within)
    two_hops = over_gloo if dist.get_backend(within) == "gloo" else OnStream()

    def exchange(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        hops = hops_of(traffic.by_rank, rank, places) if traffic else equal_hops(len(rows), nodes, places)
        target = buffer_for(rows, traffic)
        return target, two_hops(target, rows, hops, within, between)

    return exchange


def over_gloo(target: Tensor, rows: Tensor, hops: Hops, within: Any, between: Any) -> Work:
    """A thread waits for the first hop and posts the second: gloo's works have no callbacks."""
    met = rows.new_empty((sum(row_sums(hops.between)), *rows.shape[1:]))
    sent, received = column_sums(hops.first), row_sums(hops.between)
    first = all_to_all.point_to_point(met, swap_blocks(rows, hops.first), received, sent, within)

    def second() -> list[Any]:
        first.wait()
        sent, received = column_sums(hops.between), row_sums(hops.last)
        return all_to_all.post(target, swap_blocks(met, hops.between), received, sent, between)

    return all_to_all.Posted(_relay().submit(second))


@functools.cache
def _relay() -> ThreadPoolExecutor:
    """One thread, so that second hops are posted in the order of the first ones, which is equal on all ranks. It is not
    the thread that posts the first hops: that of the next exchange must not wait for this one's rows."""
    return ThreadPoolExecutor(1, "second-hop")


os.register_at_fork(after_in_child=_relay.cache_clear)


class OnStream:
    """Both hops with NCCL: a stream waits for the rows of the first, regroups them and starts the second."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(priority=-1)

    def __call__(self, target: Tensor, rows: Tensor, hops: Hops, within: Any, between: Any) -> Work:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            met = rows.new_empty((sum(row_sums(hops.between)), *rows.shape[1:]))
            rows = swap_blocks(rows, hops.first)
            sent, received = column_sums(hops.first), row_sums(hops.between)
            dist.all_to_all_single(met, rows, received, sent, group=within, async_op=True).wait()
            met = swap_blocks(met, hops.between)
            sent, received = column_sums(hops.between), row_sums(hops.last)
            return dist.all_to_all_single(target, met, received, sent, group=between, async_op=True)
