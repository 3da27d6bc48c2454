"""The MoE stream: begin, run_experts, finish, and time for the backbone in between (section 3.2, Fig. 6).

    begin(tap)          route, encode, start dispatch
    run_experts(state)  wait, compute, start combine
    finish(state)       wait, decode

State travels in return values, so several streams may be open at once and nothing is left on the module.
Backward is the mirror: finish's backward starts the gradient's transfer, begin's waits for the last one.
In a compiled block the verbs themselves are not compiled, because their shapes depend on the data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scmoe.moe.balance import router_stats
from scmoe.moe.dispatcher import Dispatcher, Pending, Receipt
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Dropless, Layout, Rows, decode, encode
from scmoe.moe.operators import Operators
from scmoe.moe.router import Router
from scmoe.moe.tokens import MoEOutput, RouterStats, Routing


class StreamState(NamedTuple):
    """An open stream: its chunks are on their way to the experts (with a receipt each), then on their way back."""

    shape: torch.Size
    routing: Routing
    layout: Layout
    stats: RouterStats | None
    in_flight: list[Pending]
    receipts: list[Receipt] | None  # None: the experts have run


class MoEStream(Operators):
    """Router, experts and the dispatcher between them.

    rows: how the rows are arranged (layout.py); None: dropless.
    """

    def __init__(self, router: Router, experts: Experts, dispatcher: Dispatcher, rows: Rows | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.dispatcher = router, experts, dispatcher
        self.rows = rows or Dropless()
        self.num_ranks = experts.num_experts // len(experts.expert_ids)  # that share the experts

    @torch.compiler.disable
    def begin(
        self, tap_BSD: Tensor, mask_BS: Tensor | None = None, chunks: int = 1, excluded_T1: Tensor | None = None
    ) -> StreamState:
        """mask_BS False: padding, which is routed nowhere and takes no capacity.

        chunks: pieces of the rows, each with its own transfers, so that one's experts hide another's transfer.
        excluded_T1: an expert that each token must not go to (DGMoE)."""
        x_TD = tap_BSD.flatten(0, -2)
        mask_T = None if mask_BS is None else mask_BS.flatten()
        routing, layout = self.operator("route", self.route, x_TD, mask_T, chunks, excluded_T1)
        announced = None if layout.counts_PE is None else self.dispatcher.announce(layout.counts_PE)
        rows = self.operator("encode", encode, _in_wire_dtype(x_TD), layout, announced)
        sent = [self.operator("dispatch", self.dispatcher.dispatch, *chunk) for chunk in rows]
        in_flight, receipts = [pending for pending, _ in sent], [receipt for _, receipt in sent]
        stats = router_stats(routing, layout, mask_T) if self.rows.sums else None
        return StreamState(tap_BSD.shape, routing, layout, stats, in_flight, receipts)

    @torch.compiler.disable
    def run_experts(self, state: StreamState) -> StreamState:
        assert state.receipts is not None, "the experts run once"
        returning = []
        for pending, receipt in zip(state.in_flight, state.receipts, strict=True):
            rows_RD = self.operator("experts", self.experts, pending.wait(), receipt.num_tokens_per_expert_e)
            returning.append(self.operator("combine", self.dispatcher.combine, rows_RD, receipt))
        return state._replace(in_flight=returning, receipts=None)

    @torch.compiler.disable
    def finish(self, state: StreamState) -> MoEOutput:
        assert state.receipts is None, "the experts run before the end"
        chunks = [pending.wait() for pending in state.in_flight]
        rows_RD = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        y_TD = self.operator("decode", decode, rows_RD, state.routing.topk_weights_TK, state.layout)
        return MoEOutput(y_TD.view(state.shape), state.stats)

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, chunks: int = 1, excluded_T1: Tensor | None = None
    ) -> MoEOutput:
        """The whole module at once: sum_i G(x)_i E_i(x) (Eq. 1)."""
        return self.finish(self.run_experts(self.begin(x_BSD, mask_BS, chunks, excluded_T1)))

    def route(
        self, x_TD: Tensor, mask_T: Tensor | None, chunks: int, excluded_T1: Tensor | None
    ) -> tuple[Routing, Layout]:
        """Where each token goes, and which row each of its copies takes."""
        routing = self.router(x_TD, mask_T, excluded_T1)
        ids_TK, num_experts = routing.topk_ids_TK, self.router.num_experts
        return routing, self.rows.arrange(ids_TK, mask_T, num_experts, self.num_ranks, chunks, self.training)


@contextmanager
def dropless(model: nn.Module) -> Iterator[None]:
    """Run the model dropless inside, whatever its rows. With a capacity a token's result depends on its batch.

    For inference, not for training: the routers' sums are not computed, and stats are None. It holds for MoE modules in
    blocks of users too, which know nothing of it."""
    streams = [module for module in model.modules() if isinstance(module, MoEStream)]
    before = [stream.rows for stream in streams]
    try:
        for stream in streams:
            stream.rows = stream.rows.dropless(stream.router.num_experts)
        yield
    finally:
        for stream, rows in zip(streams, before, strict=True):
            stream.rows = rows


def _in_wire_dtype(x_TD: Tensor) -> Tensor:
    """Under autocast the experts compute in its dtype, so rows are sent in it: half the bytes."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
