"""What all dispatchers of a rank share: its place, and the check that ranks send equally many rows
where they announce no numbers: in training with a capacity, and wherever rows are in buffers.

The Strategy makes the wire before there is a model. dispatchers.py makes the dispatchers of the
model from it.

The size of an exchange without numbers follows from a rank's own number of tokens. If another rank
has another number, gloo ends the process without a traceback, and NCCL waits or mixes rows up. A
check of every exchange would make the ranks wait for each other in every layer. So the first
exchange of a batch is checked, together with the shapes in the batch; with two batches in flight
the first exchange of each half. Only where these shapes differ are the other exchanges of the batch
checked too.

Left out: a model whose first exchange is even and a later one is not, although the batches have the
same shapes."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.turns import number_of_batch
from scmoe.parallel.mesh import Mesh


class EvenRows:
    """Compares numbers of rows over all ranks. Without a call of `begin` it compares nothing."""

    def __init__(self) -> None:
        self.group: Any = None  # a gloo group of all ranks
        self.ep_size = 1
        self.shapes = 0  # a digest of the shapes in this rank's batch
        self.has_begun = False
        self.checked: set[int] = set()  # numbers of the batches in flight that need no check

    def begin(self, tensors: Iterable[Tensor], group: Any, ep_size: int) -> None:
        """Begin a batch; every rank must call it.

        tensors: those of the batch. ep_size: ranks that share experts.
        """
        self.group = group
        self.ep_size = ep_size
        self.has_begun = True
        self.checked.clear()
        shapes = repr([tuple(t.shape) for t in tensors]).encode()
        self.shapes = int.from_bytes(hashlib.blake2b(shapes, digest_size=7).digest(), "big")

    def check(self, rows: int) -> None:
        """Raise ValueError on every rank if ranks that share experts have other numbers of rows.

        rows: how many this rank is about to send.
        """
        batch = number_of_batch()
        if not self.has_begun or batch in self.checked:
            return
        extremes = torch.tensor([rows, -rows, self.shapes, -self.shapes])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        most, least, last, first = extremes.tolist()
        if last == -first:
            self.checked.add(batch)
        if most != -least:
            self._compare(rows)

    def _compare(self, rows: int) -> None:
        of_ranks: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(of_ranks, rows, group=self.group)
        for first in range(0, len(of_ranks), self.ep_size):
            sharing = of_ranks[first : first + self.ep_size]
            if len(set(sharing)) > 1:
                numbers = "; ".join(
                    f"rank {first + i}: {number}" for i, number in enumerate(sharing)
                )
                raise ValueError(
                    "ranks that share experts have different numbers of tokens in a step, so they"
                    f" would send different numbers of rows ({numbers}); in a training with a"
                    " capacity_factor, and with rows in buffers, every rank needs as many tokens as"
                    " the others. Pad all batches to one length, or use dropless rows"
                    " (capacity_factor=None) that are not in buffers"
                )


@dataclass(frozen=True)
class Wire:
    """Joins the ranks that share experts. The default is a single process: no row travels.

    mesh: the rank's place. even: checks numbers of rows that are not announced.

    A copy is the same object, so a deep copy of a module shares its wire. A pickle holds the mesh.
    """

    mesh: Mesh = field(default_factory=Mesh)
    even: EvenRows = field(default_factory=EvenRows)

    def __copy__(self) -> "Wire":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wire":
        return self

    def __reduce__(self) -> Any:
        return Wire, (self.mesh,)

    def begin_batch(self, tensors: Iterable[Tensor]) -> None:
        """Let the first exchanges of a batch be checked. Every rank must call it.

        tensors: those of the batch.
        """
        if self.mesh.ep_size > 1:
            self.even.begin(tensors, self.mesh.control_group, self.mesh.ep_size)
