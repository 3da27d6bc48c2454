"""ScMoE (Eq. 7-10): the routed experts read the *preceding* layer, so their transfers hide behind the backbone.

    pair at Pos-2          h -> attention -> MLP -> attention -> H -> norm -> SE -> coefficient -> + H
                                        |                                           ^
                                       tap -> norm -> route, dispatch, experts, combine

The sub-layers of a pair are (attention, MLP, attention), of a block with an MoE in every block (attention). The
position says which sub-layer the tap comes before:

    Pos-1  before the last attention: the preceding block's output      H_l^MLP
    Pos-2  before the MLP                                                H_l^MH
    Pos-3  before the first attention: the pair's input                  H_{l-1}
"""

from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import MoEBlock
from scmoe.moe.tokens import MoEOutput


class ShortcutBlock(MoEBlock):
    """H + SE(H) + sum_i G(tap)_i E_i(tap), where H is the output of the last sub-layer."""

    architecture = "scmoe"
    tap_norm: nn.Module
    shared_expert: nn.Module
    coefficient: nn.Module

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None, *cache: KVCache) -> MoEOutput:
        x_BSD = self.before_tap(x_BSD, *cache)
        tap_BSD = self.tap_norm(x_BSD)
        state = self.moe.begin(tap_BSD, mask_BS, self.schedule.chunks)
        for slot, sublayer in enumerate(self.after_tap()):
            if slot == self.schedule.slot:
                state = self.moe.run_experts(state)
            x_BSD = self.operator(self.schedule.window[slot], sublayer, x_BSD, *cache)
        u_BSD = self.norm(x_BSD)
        if self.schedule.slot == len(self.schedule.window) - 1:
            state = self.moe.run_experts(state)
        shared_BSD = self.operator("shared_expert", self.shared_expert, u_BSD)
        if self.schedule.slot == len(self.schedule.window):
            state = self.moe.run_experts(state)
        routed_BSD, stats = self.moe.finish(state)
        read_BSD = tap_BSD if self.coefficient_reads_tap else u_BSD
        return MoEOutput(x_BSD + self.after(self.coefficient(read_BSD, shared_BSD, routed_BSD)), stats)
