"""Makes the dispatchers of a model from the wire of its rank."""

from dataclasses import dataclass

from torch import Tensor

from scmoe.moe.dispatcher import Dispatcher, LocalDispatcher, Traffic
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, Exchange, all_to_all
from scmoe.parallel.wire.wire import Link, Wire, Work


@dataclass(frozen=True)
class Carried:
    """An exchange that stores each of its transfers in `link.latest`."""

    exchange: Exchange
    link: Link

    def __call__(self, rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        target, self.link.latest = self.exchange(rows, traffic)
        return target, self.link.latest


def exchange_of(wire: Wire) -> Exchange:
    """Return the exchange of rows. Where gradients are paced, the link knows its transfers."""
    exchange = all_to_all(wire.mesh.ep_group)
    return exchange if wire.mesh.gradient_group is None else Carried(exchange, wire.link)


def make_dispatcher(
    wire: Wire, num_experts: int, ceiling: float | None = None, buffered: bool = False
) -> Dispatcher:
    """Return the dispatcher of one MoE module.

    It is All-to-All over the EP group, or local if EP is 1, where a rank receives exactly its fair
    share and needs no ceiling. buffered: for rows in buffers.
    """
    mesh = wire.mesh
    if mesh.ep_size == 1:
        return LocalDispatcher()
    return AllToAllDispatcher(
        mesh.ep_group,
        num_experts,
        ceiling,
        exchange_of(wire),
        counts_group=mesh.counts_group,
        buffered=buffered,
        even=wire.even,
    )
