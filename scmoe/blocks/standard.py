"""The baselines: dense blocks, standard top-k MoE (Eq. 1), shared-expert MoE (Eq. 6).

    top-k            h -> norm -> route, dispatch, experts, combine -> + h
    shared expert    h -> norm -> route, dispatch, experts, combine -> coefficient -> + h
                            |                                          ^
                            +-----------------> SE --------------------+

h is the output of the last sub-layer of one block (attention), of a pair (attention, MLP,
attention) or of four blocks.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.blocks.moe_block import MoEBlock
from scmoe.moe.tokens import MoEOutput


class DenseBlock(nn.Module):
    """Sub-layers only: attention, MLP."""

    def __init__(self, sublayers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> MoEOutput:
        for sublayer in self.sublayers:
            x_BSD = sublayer(*with_cache(x_BSD, cache=cache))
        return MoEOutput(x_BSD, None)


class TopKBlock(MoEBlock):
    """h + sum_i G(h)_i E_i(h) (Eq. 1): only chunks or a second batch can hide the transfers."""

    architecture = "top_k"

    def check_parts(self) -> None:
        assert self.tap_norm is None and self.shared_expert is None and self.coefficient is None

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> MoEOutput:
        x_BSD = self.before_tap(x_BSD, cache)
        routed_BSD, stats = self.moe(self.norm(x_BSD), mask_BS, self.schedule.chunks)
        return MoEOutput(x_BSD + self.after(routed_BSD), stats)


class SharedExpertBlock(MoEBlock):
    """h + SE(h) + sum_i G(h)_i E_i(h) (Eq. 6).

    The shared expert can hide one of the two transfers. At slot 0 the experts run first and the
    shared expert hides combine; at slot 1 it hides dispatch and they run last.
    """

    architecture = "shared_expert"
    shared_expert: nn.Module
    coefficient: nn.Module

    def check_parts(self) -> None:
        assert self.tap_norm is None
        assert self.shared_expert is not None and self.coefficient is not None

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> MoEOutput:
        x_BSD = self.before_tap(x_BSD, cache)
        u_BSD = self.norm(x_BSD)
        state = self.moe.begin(u_BSD, mask_BS, self.schedule.chunks)
        shared_BSD, state = self.through_shared_expert(u_BSD, state)
        routed_BSD, stats = self.moe.finish(state)
        return MoEOutput(x_BSD + self.after(self.coefficient(u_BSD, shared_BSD, routed_BSD)), stats)
