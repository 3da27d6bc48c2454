"""How rows reach the experts and come back: the one object that differs between one rank and many.

`dispatch` and `combine` start a transfer and return a Pending; `wait()` gives the rows. Between the two, other work
runs. Here: the protocol, one rank, and the sequential baseline. Many ranks: scmoe/parallel/dispatcher.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Receipt:
    """What `combine` must know of the dispatch it answers."""

    num_tokens_per_expert_e: Tensor | None  # rows for each local expert; None: all equal
    sent: tuple[int, ...] = ()  # rows sent to each rank; (): all equal
    received: tuple[int, ...] = ()  # rows received from each rank
    order_R: Tensor | None = None  # received row of each expert-contiguous row; None: rows need no counting
    place_R: Tensor | None = None  # its inverse


class Pending(Protocol):
    def wait(self) -> Tensor:
        """The transferred rows. Call it once, as late as possible."""
        ...


class Dispatcher(Protocol):
    def dispatch(self, rows_RD: Tensor, counts_E: Tensor | None) -> tuple[Pending, Receipt]:
        """Starts sending rows, grouped by expert, to the experts' ranks. counts_E None: all experts get the same
        number.

        The pending rows are grouped by local expert."""
        ...

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        """Starts sending the experts' rows back to where they came from, in the order in which they were dispatched."""
        ...


class Ready(NamedTuple):
    """A Pending that is done."""

    rows_RD: Tensor

    def wait(self) -> Tensor:
        return self.rows_RD


class LocalDispatcher:
    """All experts are here: nothing is sent."""

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor | None) -> tuple[Pending, Receipt]:
        return Ready(rows_RD), Receipt(counts_E)

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return Ready(rows_RD)


@dataclass(frozen=True)
class Blocking:
    """Waits for every transfer of `inner` at once, forward and so backward: the sequential baseline."""

    inner: Dispatcher

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor | None) -> tuple[Pending, Receipt]:
        pending, receipt = self.inner.dispatch(rows_RD, counts_E)
        return Ready(pending.wait()), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return Ready(self.inner.combine(rows_RD, receipt).wait())


@dataclass(frozen=True)
class Narrowed:
    """Sends rows, and so their gradients, in another type than they are computed in: half the bytes in bfloat16.

    All rows, those that stay on their rank too: the result does not depend on where an expert is.
    """

    inner: Dispatcher
    dtype: torch.dtype

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor | None) -> tuple[Pending, Receipt]:
        pending, receipt = self.inner.dispatch(rows_RD.to(self.dtype), counts_E)
        return _Widened(pending, rows_RD.dtype), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return _Widened(self.inner.combine(rows_RD.to(self.dtype), receipt), rows_RD.dtype)


@dataclass(frozen=True)
class _Widened:
    pending: Pending
    dtype: torch.dtype

    def wait(self) -> Tensor:
        return self.pending.wait().to(self.dtype)
