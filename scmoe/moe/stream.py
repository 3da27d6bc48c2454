"""The MoE stream: begin, run_experts, finish, and time for the backbone in between (section 3.2, Fig. 6).

    begin(tap)          route, encode, start dispatch
    run_experts(state)  wait, compute, start combine
    finish(state)       wait, decode

State travels in return values, so several streams may be open at once and nothing is left on the module.
Backward is the mirror: finish's backward starts the gradient's transfer, begin's waits for the last one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scmoe.moe.balance import router_stats
from scmoe.moe.dispatcher import Dispatcher, Pending, Receipt
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Layout, arrange, decode, encode, expert_capacity
from scmoe.moe.router import Router
from scmoe.tokens import MoEOutput, RouterStats, Routing


class Dispatched(NamedTuple):
    """After begin: the chunks are on their way to the experts."""

    shape: torch.Size
    routing: Routing
    layout: Layout
    stats: RouterStats
    arriving: list[tuple[Pending, Receipt]]


class Combining(NamedTuple):
    """After run_experts: the chunks are on their way back."""

    dispatched: Dispatched
    returning: list[Pending]


class MoEStream(nn.Module):
    """Router, experts and the dispatcher between them.

    capacity_factor: slots of an expert over its fair share of this rank's tokens; None: dropless.
    num_chunks: pieces of the rows, each with its own transfers, so that one's experts hide another's transfer.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        capacity_factor: float | None = None,
        num_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.dispatcher = router, experts, dispatcher
        self.capacity_factor, self.num_chunks = capacity_factor, num_chunks

    def begin(self, tap_BSD: Tensor, mask_BS: Tensor | None = None) -> Dispatched:
        """mask_BS False: padding, which is routed nowhere and takes no capacity."""
        x_TD = tap_BSD.flatten(0, -2)
        mask_T = None if mask_BS is None else mask_BS.flatten()
        routing = self.router(x_TD, mask_T)
        layout = arrange(routing.topk_ids_TK, self.router.num_experts, self.capacity(x_TD), self.num_chunks)
        chunks = encode(_in_wire_dtype(x_TD), layout)
        arriving = [self.dispatcher.dispatch(rows_RD, counts_E) for rows_RD, counts_E in chunks]
        return Dispatched(tap_BSD.shape, routing, layout, router_stats(routing, layout, mask_T), arriving)

    def run_experts(self, state: Dispatched) -> Combining:
        returning = []
        for pending, receipt in state.arriving:
            rows_RD = self.experts(pending.wait(), receipt.num_tokens_per_expert_e)
            returning.append(self.dispatcher.combine(rows_RD, receipt))
        return Combining(state, returning)

    def finish(self, state: Combining) -> MoEOutput:
        (shape, routing, layout, stats, _), returning = state
        chunks = [pending.wait() for pending in returning]
        rows_RD = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        y_TD = decode(rows_RD, routing.topk_weights_TK, layout)
        return MoEOutput(y_TD.view(shape), stats)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        """The whole module at once: sum_i G(x)_i E_i(x) (Eq. 1)."""
        return self.finish(self.run_experts(self.begin(x_BSD, mask_BS)))

    def capacity(self, x_TD: Tensor) -> int | None:
        if self.capacity_factor is None:
            return None
        return expert_capacity(x_TD.shape[0], self.router.num_experts, self.router.top_k, self.capacity_factor)


def _in_wire_dtype(x_TD: Tensor) -> Tensor:
    """Under autocast the experts compute in its dtype: send that, not twice the bytes."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
