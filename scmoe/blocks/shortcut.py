"""ScMoE (Eq. 7-10): the routed experts read the *preceding* layer, so their transfers hide behind the backbone.

    pair at Pos-2          h -> attention -> MLP -> attention -> H -> norm -> SE -> coefficient -> + H
                                        |                                           ^
                                       tap -> norm -> route, dispatch, experts, combine

The sub-layers of a pair are (attention, MLP, attention), of a block with an MoE in every block (attention). The
position is the index of the sub-layer that the tap comes before:

    Pos-1  before the last attention: the preceding block's output      H_l^MLP
    Pos-2  before the MLP                                                H_l^MH
    Pos-3  before the first attention: the pair's input                  H_{l-1}
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from scmoe.moe.operators import Operators
from scmoe.moe.stream import MoEStream, StreamState
from scmoe.schedule.schedule import SUBLAYERS, Schedule
from scmoe.tokens import MoEOutput


class ShortcutBlock(Operators):
    """H + SE(H) + sum_i G(tap)_i E_i(tap), where H is the output of the last sub-layer.

    schedule: its window is the sub-layers after the tap, then the shared expert; the experts run at its slot.
    coefficient_reads_tap: the coefficient gate reads the (normed) tap in place of the shared expert's input.
    """

    def __init__(
        self,
        sublayers: Sequence[nn.Module],
        tap_norm: nn.Module,
        norm: nn.Module,
        shared_expert: nn.Module,
        coefficient: nn.Module,
        moe: MoEStream,
        schedule: Schedule,
        after: nn.Module | None = None,
        coefficient_reads_tap: bool = False,
    ) -> None:
        super().__init__()
        tap = len(sublayers) - (len(schedule.window) - 1)
        if tap < 0:
            raise ValueError(
                f"position {schedule.position} wants {len(schedule.window) - 1} sub-layers: {len(sublayers)}"
            )
        self.sublayers, self.tap = nn.ModuleList(sublayers), tap
        self.tap_norm, self.norm = tap_norm, norm
        self.shared_expert, self.coefficient, self.moe = shared_expert, coefficient, moe
        self.schedule, self.after = schedule, after or nn.Identity()
        self.coefficient_reads_tap = coefficient_reads_tap

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        sublayers = list(self.sublayers)
        for name, sublayer in zip(SUBLAYERS, sublayers[: self.tap], strict=False):
            x_BSD = self.operator(name, sublayer, x_BSD)
        tap_BSD = self.tap_norm(x_BSD)
        state = self.moe.begin(tap_BSD, mask_BS)
        for slot, sublayer in enumerate(sublayers[self.tap :]):
            state = self.experts_at(slot, state)
            x_BSD = self.operator(self.schedule.window[slot], sublayer, x_BSD)
        state = self.experts_at(len(sublayers) - self.tap, state)
        u_BSD = self.norm(x_BSD)
        shared_BSD = self.operator("shared_expert", self.shared_expert, u_BSD)
        state = self.experts_at(len(sublayers) - self.tap + 1, state)
        routed_BSD, stats = self.moe.finish(state)
        read_BSD = tap_BSD if self.coefficient_reads_tap else u_BSD
        return MoEOutput(x_BSD + self.after(self.coefficient(read_BSD, shared_BSD, routed_BSD)), stats)

    def experts_at(self, slot: int, state: StreamState) -> StreamState:
        return self.moe.run_experts(state) if slot == self.schedule.slot else state
