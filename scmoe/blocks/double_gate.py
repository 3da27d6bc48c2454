"""DGMoE (Eq. 23): one MoE module gates twice, the preceding layer's representation and the current one's, top-1 each.

    pair at Pos-2     h -> attention -> MLP -> attention -> H -> norm -> route, dispatch, experts, combine -> + H
                                   |                                                                       ^
                                  tap -> norm -> route, dispatch, experts, combine ------------------------+

The preceding half is begun at the tap and finished at the end, so its transfers hide behind the backbone as ScMoE's
do; those of the current half hide nothing and are hidden by nothing. Where both halves would take one expert, the
current layer takes its second best: a comparison of indices (A.2), made by the router.
DGMoE-Share (A.7): two pairs of blocks share one MoE module, `share_moe`.

Both halves count as the module's load: its experts serve both, so it is their sum that has to be even
(docs/decisions/0017-double-gate.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scmoe.moe.operators import Operators
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream, StreamState
from scmoe.schedule.schedule import SUBLAYERS, Schedule
from scmoe.tokens import MoEOutput, RouterStats, Routing


class DoubleGateBlock(Operators):
    """H + sum_i [G(H)_i E_i(H) + G(tap)_i E_i(tap)], where H is the output of the last sub-layer.

    schedule: its window is the sub-layers after the tap; the experts run on the tap at its slot. The current half is
    one operator, `current`, after the window.
    """

    def __init__(
        self,
        sublayers: Sequence[nn.Module],
        tap_norm: nn.Module,
        norm: nn.Module,
        moe: MoEStream,
        schedule: Schedule,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        tap = len(sublayers) - len(schedule.window)
        if tap < 0:
            raise ValueError(f"position {schedule.position} wants {len(schedule.window)} sub-layers: {len(sublayers)}")
        if moe.router.top_k != 1:
            raise ValueError(f"top_k is {moe.router.top_k}, allowed where an MoE module gates twice: 1")
        self.sublayers, self.tap = nn.ModuleList(sublayers), tap
        self.tap_norm, self.norm, self.moe = tap_norm, norm, moe
        self.schedule, self.after = schedule, after or nn.Identity()

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        sublayers = list(self.sublayers)
        for name, sublayer in zip(SUBLAYERS, sublayers[: self.tap], strict=False):
            x_BSD = self.operator(name, sublayer, x_BSD)
        preceding = self.moe.begin(self.tap_norm(x_BSD), mask_BS)
        for slot, sublayer in enumerate(sublayers[self.tap :]):
            preceding = self.experts_at(slot, preceding)
            x_BSD = self.operator(self.schedule.window[slot], sublayer, x_BSD)
        preceding = self.experts_at(len(sublayers) - self.tap, preceding)
        current_BSD, current_stats = self.route_beside(preceding, self.norm(x_BSD), mask_BS)
        preceding_BSD, preceding_stats = self.moe.finish(preceding)
        return MoEOutput(x_BSD + self.after(current_BSD + preceding_BSD), add_stats(current_stats, preceding_stats))

    def experts_at(self, slot: int, state: StreamState) -> StreamState:
        return self.moe.run_experts(state) if slot == self.schedule.slot else state

    @torch.compiler.disable
    def route_beside(self, other: StreamState, x_BSD: Tensor, mask_BS: Tensor | None) -> MoEOutput:
        """The whole module at once, its gate leaving alone the expert that `other` has taken for each token."""
        moe = self.moe
        gate: Router = Elsewhere(moe.router, other.routing.topk_ids_TK)  # type: ignore[assignment]
        stream = MoEStream(gate, moe.experts, moe.dispatcher, moe.capacity_factor, moe.num_chunks)
        return self.operator("current", stream, x_BSD, mask_BS)


class Elsewhere(nn.Module):
    """A router's top 1 among the experts that are not taken: a view for one forward pass, with no weights of its own.

    taken_T1: an expert id of each token, or num_experts: none.
    """

    def __init__(self, router: Router, taken_T1: Tensor) -> None:
        super().__init__()
        self.router, self.taken_T1 = router, taken_T1
        self.num_experts, self.top_k = router.num_experts, router.top_k

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
        return self.router(x_TD, mask_T, self.taken_T1)


def add_stats(a: RouterStats, b: RouterStats) -> RouterStats:
    """All are sums over tokens, and so is the sum over both halves: as if twice as many tokens had been routed once."""
    return RouterStats(*(x + y for x, y in zip(a, b, strict=True)))


def share_moe(blocks: Sequence[nn.Module]) -> None:
    """DGMoE-Share: each second block takes the MoE module of the block before it. The last of an odd number keeps its
    own."""
    for first, second in zip(blocks[::2], blocks[1::2], strict=False):
        second.moe = first.moe
