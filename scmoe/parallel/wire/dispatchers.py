"""Makes the dispatchers of a model from the wire of its rank."""

from scmoe.moe.dispatcher import Dispatcher, LocalDispatcher
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from scmoe.parallel.wire.wire import Wire


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
        counts_group=mesh.counts_group,
        buffered=buffered,
        even=wire.even,
    )
