"""ScMoE (Eq. 7-10): the routed experts read the *preceding* layer, so their transfers hide behind
the backbone.

    pair at Pos-2    h -> attention -+-> MLP -> attention -> H -> norm -> SE -> coefficient -> + H
                                     |                                              ^
                                    tap -> norm -> route, dispatch, experts, combine

The sub-layers of a pair are (attention, MLP, attention), of a block with an MoE in every block
(attention). The position says which sub-layer the tap comes before:

    Pos-1  before the last attention: the preceding block's output      H_l^MLP
    Pos-2  before the MLP                                                H_l^MH
    Pos-3  before the first attention: the pair's input                  H_{l-1}

With an MoE in every block, Pos-2 taps the *preceding* block after its attention. That block hands M
on as the `carry`:

    X_l -> attention --+--> M_l -> norm -> SE -> coefficient -> + M_l -> X_{l+1}
                       |                           ^
    M_{l-1} -> norm -> route, dispatch, experts, combine
                       +---------------------------------------------> M_l

The first block has no preceding one: its tap is its own M_0, and only the shared expert hides its
transfers. NousResearch wires ScMoE in this way (torchtitan, models/moe/scmoe.py).
"""

from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import MoEBlock
from scmoe.moe.tokens import HandedOn, MoEOutput, RouterStats
from scmoe.schedule.schedule import BETWEEN_BLOCKS


class ShortcutBlock(MoEBlock):
    """H + SE(H) + sum_i G(tap)_i E_i(tap), where H is the output of the last sub-layer."""

    architecture = "scmoe"
    tap_norm: nn.Module
    shared_expert: nn.Module
    coefficient: nn.Module

    def check_parts(self) -> None:
        assert self.tap_norm is not None
        assert self.shared_expert is not None and self.coefficient is not None

    def forward(
        self,
        x_BSD: Tensor,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        carry: Tensor | None = None,
    ) -> MoEOutput | HandedOn:
        """Return H + SE(H) + the routed output.

        carry: the preceding block's, for a tap that lies there. Raises ValueError if it is missing,
        or given to a block that taps itself.
        """
        x_BSD = self.before_tap(x_BSD, cache)
        tap_BSD = self.tap_norm(self.tapped(x_BSD, carry))
        state = self.moe.begin(tap_BSD, mask_BS, self.schedule.chunks)
        h_BSD, state = self.through_window(x_BSD, state, cache)
        u_BSD = self.norm(h_BSD)
        shared_BSD, state = self.through_shared_expert(u_BSD, state)
        routed_BSD, stats = self.moe.finish(state)
        read_BSD = tap_BSD if self.coefficient_reads_tap else u_BSD
        y_BSD = h_BSD + self.after(self.coefficient(read_BSD, shared_BSD, routed_BSD))
        return self.output(y_BSD, stats, h_BSD)

    def tapped(self, x_BSD: Tensor, carry: Tensor | None) -> Tensor:
        """Return what the routed experts read, before its norm: x of this block, or the carry."""
        is_carried = self.schedule.position == "carried"
        if is_carried and carry is None:
            raise ValueError(f"{self.schedule.name} requires the carry of the block before it.")
        if not is_carried and carry is not None:
            raise ValueError(
                f"{self.schedule.name} taps its own sub-layers. Call it without a carry."
            )
        return x_BSD if carry is None else carry

    def output(
        self, y_BSD: Tensor, stats: RouterStats | None, h_BSD: Tensor
    ) -> MoEOutput | HandedOn:
        """Return y, with H as the carry where the next block taps it."""
        if self.schedule.position in BETWEEN_BLOCKS:
            return HandedOn(y_BSD, stats, h_BSD)
        return MoEOutput(y_BSD, stats)
