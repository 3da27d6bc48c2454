"""DGMoE (Eq. 23): one MoE module routes the preceding layer's representation and the current one's,
top-1 each.

    pair at Pos-2    h -> attention -+-> MLP -> attention -> H -> norm -> current half -> + H
                                     |                                                    ^
                                    tap -> norm -> preceding half ------------------------+

    half             route, dispatch, experts, combine

The preceding half begins at the tap and ends at the end of the block, so its transfers hide behind
the backbone as ScMoE's do. The transfers of the current half are not hidden. If both gates choose
the same expert for a token, the current half goes to its second-best expert: the router compares
expert ids (A.2). Without this constraint (`distinct_experts` False) both halves of most tokens go
to one expert, and the paper calls this equivalent to top-1 (section 5.1.1). In DGMoE-Share (A.7)
two pairs of blocks share one MoE module (`share_moe`).

The module's load is the sum of both gates', because its experts serve both
(docs/decisions/0017-double-gate.md).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import MoEBlock
from scmoe.moe.balance import add_stats
from scmoe.moe.tokens import MoEOutput


class DoubleGateBlock(MoEBlock):
    """H + sum_i [G(H)_i E_i(H) + G(tap)_i E_i(tap)], where H is the output of the last sub-layer.

    schedule: the experts run on the tap at its slot. The current half is one operator, `current`,
    after the window.
    """

    architecture = "dgmoe"
    tap_norm: nn.Module

    def check_parts(self) -> None:
        """Raise ValueError where a token would go to more than one expert of each half."""
        assert self.tap_norm is not None
        assert self.shared_expert is None and self.coefficient is None
        if self.moe.router.top_k != 1:
            raise ValueError(
                f"top_k is {self.moe.router.top_k}, allowed where an MoE module gates twice: 1"
            )
        if self.distinct_experts and self.moe.router.num_ids < 2:
            raise ValueError(
                "num_experts is 1, allowed where an MoE module gives each token two experts: 2 or"
                " more"
            )

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> MoEOutput:
        x_BSD = self.before_tap(x_BSD, cache)
        preceding = self.moe.begin(self.tap_norm(x_BSD), mask_BS, self.schedule.chunks)
        x_BSD, preceding = self.through_window(x_BSD, preceding, cache)
        if self.schedule.slot == len(self.schedule.window):
            preceding = self.moe.run_experts(preceding)
        taken_T1 = preceding.routing.topk_ids_TK if self.distinct_experts else None
        arguments = self.norm(x_BSD), mask_BS, self.schedule.chunks, taken_T1
        current_BSD, current_stats = self.noted_as("current", self.moe, *arguments)
        preceding_BSD, preceding_stats = self.moe.finish(preceding)
        stats = None
        if current_stats is not None and preceding_stats is not None:
            stats = add_stats(current_stats, preceding_stats)
        return MoEOutput(x_BSD + self.after(current_BSD + preceding_BSD), stats)


def share_moe(blocks: Sequence[nn.Module]) -> None:
    """Let each second block take the MoE module of the block before it (DGMoE-Share).

    With an odd number of blocks the last one keeps its own module.
    """
    for first, second in zip(blocks[::2], blocks[1::2], strict=False):
        second.moe = first.moe
