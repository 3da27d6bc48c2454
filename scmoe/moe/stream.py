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
from scmoe.moe.layout import (
    Layout,
    arrange_buffers,
    arrange_filled,
    arrange_slots,
    buffer_size,
    decode,
    drop_beyond,
    encode,
    expert_capacity,
    rounded_up,
)
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

    capacity_factor: slots of an expert, as a multiple of its fair share of this rank's tokens; None: dropless.
    filled: send and compute only the filled slots. The host must know how many there are: this is free on a CPU, and a
    synchronisation on a GPU.
    buffer: dropless rows between ranks are in buffers of this multiple of a rank's fair share (moe/layout.py), without
    host synchronisation.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        capacity_factor: float | None = None,
        filled: bool = False,
        buffer: float | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not 0 < capacity_factor <= 1e6:
            raise ValueError(f"capacity_factor is {capacity_factor}, allowed: None, or above 0 and at most 1e6")
        self.router, self.experts, self.dispatcher = router, experts, dispatcher
        self.capacity_factor, self.filled = capacity_factor, filled or capacity_factor is None
        self.buffer = buffer
        self.sums = True  # compute the router's sums, which losses and metrics read

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
        stats = router_stats(routing, layout, mask_T) if self.sums else None
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
        return routing, self.arrange(routing.topk_ids_TK, mask_T, chunks)

    @property
    def num_ranks(self) -> int:
        """Ranks that share the experts."""
        return self.experts.num_experts // len(self.experts.expert_ids)

    def arrange(self, ids_TK: Tensor, mask_T: Tensor | None, chunks: int) -> Layout:
        """Dropless: in buffers, or filled. With a capacity: filled slots alone, or all slots. Outside training, ranks
        may have different numbers of tokens and therefore of slots, so they announce the filled ones."""
        (T, K), E, factor = ids_TK.shape, self.router.num_experts, self.capacity_factor
        if self.buffer is not None and (ranks := self.num_ranks) > 1:
            return arrange_buffers(ids_TK, E, ranks, buffer_size(T, K, ranks, self.buffer), chunks)
        if factor is None:
            return arrange_filled(ids_TK, E, chunks, padded=mask_T is not None)
        capacity = expert_capacity(T, E, K, factor)
        # padding adds no capacity: the slots that it would bring stay empty, so that shapes depend on no data
        room = capacity if mask_T is None else rounded_up(factor * mask_T.sum().double() * K / E)
        if self.filled or (not self.training and self.num_ranks > 1):
            return arrange_filled(drop_beyond(ids_TK, E, room), E, chunks)
        return arrange_slots(ids_TK, E, capacity, chunks, room)


@contextmanager
def dropless(model: nn.Module) -> Iterator[None]:
    """Run the model dropless inside, whatever its capacity. With a capacity a token's result depends on its batch.

    For inference, not for training: the routers' sums are not computed, and stats are None."""
    streams = [module for module in model.modules() if isinstance(module, MoEStream)]
    before = [(stream.capacity_factor, stream.buffer, stream.filled, stream.sums) for stream in streams]
    try:
        for stream in streams:
            # every rank must use the same layout, so buffers remain, but with room for every copy
            buffer = None if stream.buffer is None else float(stream.router.num_experts)
            stream.capacity_factor, stream.buffer, stream.filled, stream.sums = None, buffer, True, False
        yield
    finally:
        for stream, values in zip(streams, before, strict=True):
            stream.capacity_factor, stream.buffer, stream.filled, stream.sums = values


def _in_wire_dtype(x_TD: Tensor) -> Tensor:
    """Under autocast the experts compute in its dtype, so rows are sent in it: half the bytes."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
