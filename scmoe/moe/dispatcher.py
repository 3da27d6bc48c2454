"""The dispatcher sends rows to the experts and back. It is the one object that differs between one
rank and many.

`dispatch` and `combine` start a transfer and return a Pending; `wait()` returns the rows. Other
work runs in between. Where experts get different numbers of rows, `announce` exchanges the numbers
of all chunks first, in one transfer that starts at the gate. This file has the protocol, the
dispatcher of one rank, and two wrappers; that of many ranks is in parallel/wire/.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Traffic(NamedTuple):
    """Numbers of rows of one exchange."""

    sent: Sequence[int]  # to each rank
    received: Sequence[int]  # from each rank

    def back(self) -> "Traffic":
        """Return the traffic of the same rows on their way back."""
        return Traffic(self.received, self.sent)


@dataclass(frozen=True)
class Receipt:
    """What `combine` needs to know about the dispatch that it reverses."""

    num_tokens_per_expert_e: Tensor | None  # rows for each local expert; None: all equal
    traffic: Traffic | None = None  # of the dispatch; None: equal numbers between all ranks
    # received row of each expert-contiguous row; None: equal numbers, or one rank
    order_R: Tensor | None = None
    place_R: Tensor | None = None  # its inverse


@dataclass(frozen=True)
class ChunkCounts:
    """Numbers of rows of one chunk."""

    num_rows: int | None  # of this rank; None: all chunks have the same number
    counts_from_e: Tensor  # [senders, e] for each local expert, on the device
    traffic: Traffic | None = None  # None: equal numbers between all ranks


class Announced(Protocol):
    def wait(self) -> Sequence[ChunkCounts]:
        """Return the counts of every chunk, once all ranks have announced theirs. Call it once."""


class Pending(Protocol):
    def wait(self) -> Tensor:
        """Return the transferred rows. Call it once, as late as possible."""


class Dispatcher(Protocol):
    def announce(self, counts_PE: Tensor) -> Announced:
        """Start to tell all ranks how many rows of each chunk go to each expert."""

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        """Start to send rows, grouped by expert, to the experts' ranks.

        The pending rows are grouped by local expert. counts: of this chunk, as announced; None: all
        experts get the same number.
        """

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        """Start to send the experts' rows back to their ranks.

        They arrive in the order of the dispatched rows.
        """


class Ready(NamedTuple):
    """A Pending whose transfer is finished, or an Announced."""

    value: Any

    def wait(self) -> Any:
        return self.value


@dataclass(frozen=True)
class Arriving:
    """A transfer in flight, and what is done with its rows on arrival."""

    transfer: Pending
    on_arrival: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.on_arrival(self.transfer.wait())


class LocalDispatcher:
    """The dispatcher of one rank that holds all experts: nothing is sent."""

    def announce(self, counts_PE: Tensor) -> Announced:
        """Read the numbers of rows on the host only where there are several chunks to split."""
        chunks = counts_PE.chunk(counts_PE.shape[0])
        sizes = [None] if len(chunks) == 1 else counts_PE.sum(1).tolist()
        return Ready(
            [ChunkCounts(size, counts_1E) for size, counts_1E in zip(sizes, chunks, strict=True)]
        )

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        return Ready(rows_RD), Receipt(None if counts is None else counts.counts_from_e[0])

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return Ready(rows_RD)


@dataclass(frozen=True)
class Blocking:
    """The sequential baseline, which waits for each transfer of `inner` right after its start.

    It does so in forward, and therefore in backward.
    """

    inner: Dispatcher

    def announce(self, counts_PE: Tensor) -> Announced:
        return self.inner.announce(counts_PE)

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        pending, receipt = self.inner.dispatch(rows_RD, counts)
        return Ready(pending.wait()), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return Ready(self.inner.combine(rows_RD, receipt).wait())


@dataclass(frozen=True)
class Narrowed:
    """Sends rows and their gradients in another dtype than that of the computation.

    bfloat16 takes half of the bytes. Rows that stay on their rank are converted too, so the result
    does not depend on where an expert is.
    """

    inner: Dispatcher
    dtype: torch.dtype

    def announce(self, counts_PE: Tensor) -> Announced:
        return self.inner.announce(counts_PE)

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        pending, receipt = self.inner.dispatch(rows_RD.to(self.dtype), counts)
        return Arriving(pending, partial(Tensor.to, dtype=rows_RD.dtype)), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return Arriving(
            self.inner.combine(rows_RD.to(self.dtype), receipt),
            partial(Tensor.to, dtype=rows_RD.dtype),
        )
