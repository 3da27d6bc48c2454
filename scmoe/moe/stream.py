"""The MoE stream: begin, run_experts, finish, and time for the backbone in between (section 3.2,
Fig. 6).

    begin(tap)          route, encode, start dispatch
    run_experts(state)  wait, compute, start combine
    finish(state)       wait, decode

A zero expert returns its input (LongCat-Flash, arXiv 2509.01322). Its copies get no row, so nothing
is sent or computed for them; finish adds weight x tap.

State travels in return values, so several streams may be open at once and nothing is left on the
module. Before each wait for rows the stream passes the turn, if its batch is one of several in
flight (turns.py). Backward is the mirror: finish's backward starts the gradient's transfer, begin's
waits for the last one. In a compiled block the verbs themselves are not compiled, because their
shapes depend on the data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scmoe.moe.balance import router_stats
from scmoe.moe.dispatcher import Dispatcher, Pending, Receipt
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Dropless, Layout, Rows, Target, decode, encode
from scmoe.moe.operators import Operators
from scmoe.moe.router import Router
from scmoe.moe.tokens import MoEOutput, RouterStats, Routing
from scmoe.moe.turns import pass_turn


class StreamState(NamedTuple):
    """An open stream: its chunks are on their way to the experts, then on their way back."""

    shape: torch.Size
    routing: Routing
    layout: Layout
    stats: RouterStats | None
    transfers: list[Pending]
    receipts: list[Receipt] | None  # of each chunk; None: the experts have run
    tap_TD: Tensor | None  # what zero experts return; None: there are none


class MoEStream(Operators):
    """Router, experts and the dispatcher between them.

    rows: how the rows are arranged (layout.py); None: dropless.
    """

    def __init__(
        self, router: Router, experts: Experts, dispatcher: Dispatcher, rows: Rows | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.rows = rows or Dropless()
        self.num_ranks = experts.num_experts // len(experts.expert_ids)  # that share the experts

    def arrange_as(self, rows: Rows) -> Rows:
        """Arrange rows in this way from now on. Return how they were arranged before."""
        before = self.rows
        self.rows = rows
        return before

    @torch.compiler.disable
    def begin(
        self,
        tap_BSD: Tensor,
        mask_BS: Tensor | None = None,
        chunks: int = 1,
        excluded_T1: Tensor | None = None,
    ) -> StreamState:
        """Route the tokens, encode their rows and start to send them.

        mask_BS False: padding, which is routed nowhere and takes no capacity. chunks: pieces of the
        rows, each with its own transfers, so that one's experts hide another's transfer.
        excluded_T1: an expert that each token must not go to (DGMoE).
        """
        x_TD = tap_BSD.reshape(-1, tap_BSD.shape[-1])
        mask_T = None if mask_BS is None else mask_BS.flatten()
        routing, layout = self.operator("route", self.route, x_TD, mask_T, chunks, excluded_T1)
        announced = None if layout.counts_PE is None else self.dispatcher.announce(layout.counts_PE)
        # encode waits for the counts without passing the turn: else the other batch would compute
        # all that it can before these rows leave, and nothing would be left to hide them
        rows = self.operator("encode", encode, _in_wire_dtype(x_TD), layout, announced)
        sent = [self.operator("dispatch", self.dispatcher.dispatch, *chunk) for chunk in rows]
        transfers, receipts = [pending for pending, _ in sent], [receipt for _, receipt in sent]
        stats = self.sums(routing, layout, mask_T, tap_BSD.shape) if self.rows.sums else None
        kept_TD = x_TD if self.router.zero_experts else None
        return StreamState(tap_BSD.shape, routing, layout, stats, transfers, receipts, kept_TD)

    @torch.compiler.disable
    def run_experts(self, state: StreamState) -> StreamState:
        """Wait for the rows, compute the experts and start to send their rows back."""
        assert state.receipts is not None, "the experts run once"
        returning = []
        for pending, receipt in zip(state.transfers, state.receipts, strict=True):
            pass_turn()
            rows_RD = self.operator(
                "experts", self.experts, pending.wait(), receipt.num_tokens_per_expert_e
            )
            returning.append(self.operator("combine", self.dispatcher.combine, rows_RD, receipt))
        return state._replace(transfers=returning, receipts=None)

    @torch.compiler.disable
    def finish(self, state: StreamState) -> MoEOutput:
        """Wait for the rows and return the weighted sum for each token."""
        assert state.receipts is None, "the experts run before the end"
        chunks = []
        for pending in state.transfers:
            pass_turn()
            chunks.append(pending.wait())
        rows_RD = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        y_TD = self.operator("decode", decode, rows_RD, state.routing.topk_weights_TK, state.layout)
        if state.tap_TD is not None:
            zero_TD = from_zero_experts(state.tap_TD, state.routing, self.router.num_experts)
            y_TD = y_TD + zero_TD.to(y_TD.dtype)
        return MoEOutput(y_TD.view(state.shape), state.stats)

    def forward(
        self,
        x_BSD: Tensor,
        mask_BS: Tensor | None = None,
        chunks: int = 1,
        excluded_T1: Tensor | None = None,
    ) -> MoEOutput:
        """Return the output of the whole module at once: sum_i G(x)_i E_i(x) (Eq. 1)."""
        return self.finish(self.run_experts(self.begin(x_BSD, mask_BS, chunks, excluded_T1)))

    def route(
        self, x_TD: Tensor, mask_T: Tensor | None, chunks: int, excluded_T1: Tensor | None
    ) -> tuple[Routing, Layout]:
        """Return where each token goes, and which row each of its copies takes."""
        routing = self.router(x_TD, mask_T, excluded_T1)
        ids_TK, router = routing.topk_ids_TK, self.router
        if router.zero_experts:
            ids_TK = ids_TK.clamp(max=router.num_experts)
        target = Target(
            router.num_experts, self.num_ranks, chunks, self.training, router.zero_experts
        )
        return routing, self.rows.arrange(ids_TK, mask_T, target)

    def sums(
        self, routing: Routing, layout: Layout, mask_T: Tensor | None, shape: torch.Size
    ) -> RouterStats:
        """Return the sums of which losses and metrics are computed."""
        scoring, seq_len = self.router.scoring, None
        if scoring.per_sequence:
            seq_len = (shape[1:-1] or shape[:-1]).numel()  # [T, D] is one sequence
        routing = routing._replace(scores_TE=scoring.shares(routing.scores_TE))
        return router_stats(routing, layout, mask_T, self.router.num_experts, seq_len)


class dropless:
    """A context for inference, in which MoE modules drop no copy, whatever their rows.

    With a capacity a token's result would depend on its batch. Inside, the routers' sums are not
    computed, and stats are None. Entering changes how each stream arranges its rows, and leaving
    restores it. This is a context and not an argument, because users' own blocks hold MoE modules
    and do not have the argument. Generation enters one at each token, so entering is cheap. Not
    reentrant. The arrangement inside follows from the rows that each stream had when `dropless` was
    created.
    """

    def __init__(self, model: nn.Module) -> None:
        self.streams = [module for module in model.modules() if isinstance(module, MoEStream)]
        self.rows = [stream.rows.dropless(stream.router.num_experts) for stream in self.streams]
        self.rows_outside: list[Rows] = []

    def __enter__(self) -> None:
        self.rows_outside = self.arrange_as(self.rows)

    def __exit__(self, *error: object) -> None:
        self.arrange_as(self.rows_outside)

    def arrange_as(self, rows: list[Rows]) -> list[Rows]:
        return [stream.arrange_as(each) for stream, each in zip(self.streams, rows, strict=True)]


def move_biases(model: nn.Module, sums_LE2: Tensor | Sequence[Tensor]) -> None:
    """Move the selection bias of each router by the load of a step.

    sums_LE2: `integer_sums` over ranks and batches. A module that several blocks share
    (DGMoE-Share) moves once, by the load of all of them. Raises ValueError if custom blocks return
    sums for a different number of MoE modules than they contain.
    """
    routers = [stream.router for stream in _streams(model, set())]
    if all(router.bias is None for router in routers):
        return
    if len(routers) != len(sums_LE2):
        raise ValueError(
            f"The blocks contain {len(routers)} MoE modules and return the sums of"
            f" {len(sums_LE2)}. A selection bias needs the sums of each module, in their order."
            " Return them, or use moe.router=softmax without moe.bias_rate, which has no bias."
        )
    for router in dict.fromkeys(routers):
        uses = [sums for sums, other in zip(sums_LE2, routers, strict=True) if other is router]
        sums_E2 = torch.stack(uses).sum(0)
        if router.bias is not None:
            router.bias.move(sums_E2[:-2], sums_E2[-2] * router.top_k)


def _streams(module: nn.Module, seen: set[nn.Module]) -> list[MoEStream]:
    """Return the MoE modules of a module in their order. One that several modules hold
    (DGMoE-Share) comes once for each of them.

    seen: other modules whose MoE modules are listed already; it is extended.
    """
    if isinstance(module, MoEStream):
        return [module]
    if module in seen:
        return []
    seen.add(module)
    return [stream for child in module.children() for stream in _streams(child, seen)]


def from_zero_experts(x_TD: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Return the sum of the outputs of zero experts: each token times the weights of its copies to
    them."""
    weights_TK = routing.topk_weights_TK.where(routing.topk_ids_TK >= num_experts, 0.0)
    return weights_TK.sum(-1, keepdim=True).to(x_TD.dtype) * x_TD


def _in_wire_dtype(x_TD: Tensor) -> Tensor:
    """Return the tokens in autocast's dtype, in which the experts compute: half the bytes."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
