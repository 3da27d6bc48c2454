"""What a rank of a cluster attains, as cluster.py makes it of a profile: seconds of collectives
over two tiers, links in the node and the network between nodes.

A transfer is an all-to-all. Ranks that share the experts are neighbours, and the rank with the most
distant rows decides: with EP 6 on nodes of 8, ranks 6 to 11 are on two nodes, and rank 6 sends 4 of
6 parts over the network.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Link(NamedTuple):
    """What a rank's link attains: bytes a second in one direction, and the seconds of a transfer
    without bytes."""

    rate: float
    latency: float


class Spread(NamedTuple):
    """How groups are spread over nodes. fewest, most: the ranks that one group has on one of its
    nodes. nodes: the most nodes that a group is on."""

    fewest: int
    most: int
    nodes: int


class Groups(NamedTuple):
    """The groups that all ranks of a job are in. size: ranks of a group. distance: between
    neighbours in a group; the ranks between them are in other groups."""

    size: int
    ranks: int
    distance: int = 1

    def on_nodes(self, ranks_per_node: int) -> Spread:
        return _spread(self, ranks_per_node)


@cache
def _spread(groups: Groups, ranks_per_node: int) -> Spread:
    size, ranks, distance = groups
    together = Counter(
        (rank // (size * distance), rank % distance, rank // ranks_per_node)
        for rank in range(ranks)
    )
    nodes = Counter((span, offset) for span, offset, _ in together)
    return Spread(min(together.values()), max(together.values()), max(nodes.values()))


@dataclass(frozen=True)
class Machine:
    """What a rank attains, in FLOP/s, B/s and seconds; factors as KEYS names them.

    network: None where all ranks are on one node.
    """

    flops: float
    memory: float
    node: Link
    network: Link | None
    ranks_per_node: int
    peer: float = 0.0
    launch: float = 0.0
    attention: float = 1.0
    moe: float = 0.0
    copy: float = 0.0
    tax: float = 0.0
    halves: float = 1.0
    fixed: float = 0.0
    other: float = 0.0
    fused: bool = False

    def outside(self) -> Link:
        assert self.network is not None, "the profile refuses more ranks than it has"
        return self.network

    def all_to_all_latency(self, groups: Groups) -> float:
        """Return the seconds of an all-to-all without bytes."""
        if groups.size == 1:
            return 0.0
        link = self.node if groups.on_nodes(self.ranks_per_node).nodes == 1 else self.outside()
        return link.latency + self.peer * (groups.size - 1)

    def all_to_all(self, nbytes: float, groups: Groups, copies: int | None = None) -> float:
        """Return the seconds of an all-to-all of every group.

        nbytes: of a rank, what stays on it included. Bytes in the node and between nodes travel at
        the same time. copies: as of `all_to_all_bytes`.
        """
        if groups.size == 1:
            return 0.0
        seconds = self.all_to_all_bytes(nbytes, groups, copies)
        return self.all_to_all_latency(groups) + max(seconds.values())

    def all_to_all_bytes(
        self, nbytes: float, groups: Groups, copies: int | None = None
    ) -> dict[str, float]:
        """Return the seconds of the bytes of an all-to-all by tier, each of the rank that sends
        most over it. copies: of a token, where one row for each node travels between nodes and is
        copied there, as DeepEP and HybridEP do; None: each copy travels."""
        size, spread = groups.size, groups.on_nodes(self.ranks_per_node)
        seconds = {"node": nbytes * (spread.most - 1) / size / self.node.rate}
        if spread.nodes > 1:
            leaving = nbytes * (size - spread.fewest) / size
            if copies is not None:
                leaving *= rows_for_each_node(copies, spread.nodes)
            seconds["network"] = leaving / self.outside().rate
        return seconds

    def gather(self, nbytes: float, groups: Groups) -> float:
        """Return the seconds in which each rank of a group gets a tensor that is split over them,
        or sums one and keeps its part: half of a sum that all keep; without latency."""
        return self.all_reduce(nbytes, groups) / 2

    def all_reduce(self, nbytes: float, groups: Groups) -> float:
        """Return the seconds in which a ring in each node, and one between nodes for each part,
        sum a tensor; without latency, since tensors are summed in large buckets."""
        fewest, most, nodes = groups.on_nodes(self.ranks_per_node)
        seconds = 2 * nbytes * (most - 1) / most / self.node.rate
        if nodes > 1:
            seconds += 2 * nbytes / fewest * (nodes - 1) / nodes / self.outside().rate
        return seconds


def rows_for_each_node(copies: int, nodes: int) -> float:
    """Return the nodes that a token's copies are on, over the copies, if the load is even."""
    return nodes * (1 - (1 - 1 / nodes) ** copies) / copies
