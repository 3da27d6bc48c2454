"""Sends rows to the experts' ranks and back by All-to-All over an expert-parallel group.

Rank r of the group holds experts r E/EP .. (r+1) E/EP - 1, so rows grouped by expert are grouped by rank. They arrive
grouped by (sender, local expert) and are regrouped by local expert after the wait.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Arriving, Pending, Receipt
from scmoe.moe.layout import gather
from scmoe.moe.operators import Recorder
from scmoe.parallel.all_to_all import Exchange, Transfer, all_to_all


class CeilingError(MemoryError):
    """Dropless routing would send a rank more rows than it may receive."""


class AllToAllDispatcher:
    """The dispatcher of many ranks. Equal numbers of rows per expert need nothing from the host; unequal numbers
    (dropless) are exchanged before the rows.

    ceiling: rows that a rank may receive, over its fair share; None: any number.
    exchange: how rows travel; None: by All-to-All over the group.
    recorder: notes the times of transfers that run in parallel; None: they are not noted.
    """

    def __init__(
        self,
        group: Any,
        num_experts: int,
        ceiling: float | None = None,
        exchange: Exchange | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.group, self.num_experts, self.ceiling, self.recorder = group, num_experts, ceiling, recorder
        self.exchange = exchange or all_to_all(group)
        self.ep_size = dist.get_world_size(group)

    def recorded_by(self, recorder: Recorder) -> "AllToAllDispatcher":
        """The same dispatcher with a recorder."""
        return AllToAllDispatcher(self.group, self.num_experts, self.ceiling, self.exchange, recorder)

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor | None) -> tuple[Pending, Receipt]:
        if counts_E is None:
            regroup = partial(swap, outer=self.ep_size, inner=self.num_experts // self.ep_size)
            return Arriving(self.start("dispatch", rows_RD), regroup), Receipt(None)
        counts_from_e = self.exchange_counts(counts_E)
        sent, received = counts_E.view(self.ep_size, -1).sum(1).tolist(), counts_from_e.sum(1).tolist()
        # the label of each received row is its local expert; a stable sort by label groups the senders' rows
        labels = torch.arange(counts_from_e.numel(), device=counts_E.device) % counts_from_e.shape[1]
        order_R = labels.repeat_interleave(counts_from_e.flatten()).argsort(stable=True)
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        transfer = self.start("dispatch", rows_RD, sent, received)
        receipt = Receipt(counts_from_e.sum(0), tuple(sent), tuple(received), order_R, place_R)
        return Arriving(transfer, lambda rows: gather(rows, order_R, place_R[:, None], complete=True)), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        if receipt.order_R is None:
            return self.start("combine", swap(rows_RD, self.num_experts // self.ep_size, self.ep_size))
        assert receipt.place_R is not None
        rows_RD = gather(rows_RD, receipt.place_R, receipt.order_R[:, None], complete=True)
        return self.start("combine", rows_RD, receipt.received, receipt.sent)

    def start(self, operator: str, rows_RD: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()) -> Transfer:
        return Transfer(self.exchange, sent, received, operator, self.recorder).start(rows_RD)

    def exchange_counts(self, counts_E: Tensor) -> Tensor:
        """[EP, e]: rows that each rank sends to each expert here. The host waits for these numbers.

        Every rank receives the counts of all ranks, so that all of them notice if one would receive too many.
        """
        counts = counts_E.new_empty(self.ep_size, self.num_experts)
        dist.all_gather(list(counts), counts_E.contiguous(), group=self.group)
        counts = counts.view(self.ep_size, self.ep_size, -1)  # [sender, receiver, e]
        if self.ceiling is not None:
            check_ceiling(counts.sum((0, 2)).tolist(), self.ceiling)
        return counts[:, dist.get_rank(self.group)]


def swap(rows_RD: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in the order (outer, inner) to (inner, outer): between senders and local experts, of equal numbers."""
    return rows_RD.view(outer, inner, -1, rows_RD.shape[1]).transpose(0, 1).reshape_as(rows_RD)


def check_ceiling(received: list[int], ceiling: float) -> None:
    """Raises CeilingError before memory for the rows is allocated (fault 31). received: rows for each rank."""
    fair = sum(received) / len(received)
    worst = max(range(len(received)), key=lambda rank: received[rank])
    if received[worst] > ceiling * fair:
        raise CeilingError(
            f"rank {worst} of the expert-parallel group would receive {received[worst]} rows, allowed: "
            f"{ceiling:g} x the fair share of {fair:g} (moe.dropless_ceiling); raise it, or moe.load_balance_coef, or "
            "drop tokens with moe.capacity_factor"
        )
