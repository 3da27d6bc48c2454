"""What all dispatchers of a rank share: its place, and a check of the numbers of rows.

The Strategy makes it before there is a model. dispatchers.py makes the dispatchers of the model
from it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from scmoe.parallel.mesh import Mesh
from scmoe.parallel.wire.even_rows import EvenRows


class Work(Protocol):
    """An exchange in flight."""

    def wait(self) -> Any:
        """Return when the caller may use the rows in its next computation."""


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
        """Let the first exchange of a training's batch be checked. Every rank must call it.

        tensors: those of the batch.
        """
        if self.mesh.ep_size > 1:
            self.even.begin(tensors, self.mesh.control_group, self.mesh.ep_size)
