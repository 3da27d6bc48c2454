"""What carries rows between the ranks that share experts, for all MoE modules of a model.

A `Mesh` says where a rank is; a `Wire` sends. It makes the dispatchers, and keeps what these share:
which rows are in flight, and whether ranks send equally many.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scmoe.moe.dispatcher import Dispatcher, LocalDispatcher, Traffic
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, Exchange, Work, all_to_all
from scmoe.parallel.wire.even_rows import EvenRows


class Link:
    """Keeps this rank's latest exchange of rows.

    Gradients can wait until it is finished (update/pacing.py).
    """

    def __init__(self) -> None:
        self.latest: Work | None = None

    def wait(self) -> None:
        """Return when no rows are in flight."""
        while (work := self.latest) is not None:
            work.wait()
            if work is self.latest:
                return


@dataclass(frozen=True)
class Carried:
    """An exchange that stores each of its transfers in `link.latest`."""

    exchange: Exchange
    link: Link

    def __call__(self, rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        target, self.link.latest = self.exchange(rows, traffic)
        return target, self.link.latest


@dataclass(frozen=True)
class Wire:
    """Makes the dispatchers of a model. The default is a single process, in which no row travels.

    mesh: the rank's place. link: knows the All-to-All in flight. even: checks numbers of rows that
    are not announced.

    A copy is the same object, so a deep copy of a module shares its wire. A pickle holds the mesh.
    """

    mesh: Mesh = field(default_factory=Mesh)
    link: Link = field(default_factory=Link)
    even: EvenRows = field(default_factory=EvenRows)

    def __copy__(self) -> "Wire":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wire":
        return self

    def __reduce__(self) -> Any:
        return Wire, (self.mesh,)

    def dispatcher(
        self, num_experts: int, ceiling: float | None = None, buffered: bool = False
    ) -> Dispatcher:
        """Return the dispatcher of one MoE module.

        It is All-to-All over the EP group, or local if EP is 1, where a rank receives exactly its
        fair share and needs no ceiling. buffered: for rows in buffers.
        """
        mesh = self.mesh
        if mesh.ep_size == 1:
            return LocalDispatcher()
        return AllToAllDispatcher(
            mesh.ep_group,
            num_experts,
            ceiling,
            self.exchange(),
            counts_group=mesh.counts_group,
            buffered=buffered,
            even=self.even,
        )

    def exchange(self) -> Exchange:
        """Return the exchange of rows. Where gradients are paced, `link` knows its transfers."""
        exchange = all_to_all(self.mesh.ep_group)
        return exchange if self.mesh.gradient_group is None else Carried(exchange, self.link)

    def begin_batch(self, tensors: Iterable[Tensor]) -> None:
        """Let the first exchange of a training's batch be checked. Every rank must call it.

        tensors: those of the batch.
        """
        if self.mesh.ep_size > 1:
            self.even.begin(tensors, self.mesh.control_group, self.mesh.ep_size)
