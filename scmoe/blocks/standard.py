"""The baselines: dense blocks, standard top-k MoE (Eq. 1), shared-expert MoE (Eq. 6).

Each holds the sub-layers of one block (attention) or of a pair (attention, MLP, attention) and ends in its MoE module.
All blocks of the library are called alike: block(x_BSD, mask_BS) gives an MoEOutput.
`after` is what the MoE module's output goes through before it is added: dropout; in SwinV2, a norm and drop path.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from scmoe.moe.operators import Operators
from scmoe.moe.stream import MoEStream
from scmoe.schedule.schedule import SUBLAYERS, Schedule
from scmoe.tokens import MoEOutput


class DenseBlock(nn.Module):
    """Sub-layers only: attention, MLP."""

    def __init__(self, sublayers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        for sublayer in self.sublayers:
            x_BSD = sublayer(x_BSD)
        return MoEOutput(x_BSD, None)


class TopKBlock(Operators):
    """h + sum_i G(h)_i E_i(h), h the output of the last sub-layer (Eq. 1): nothing to hide the transfers behind."""

    def __init__(
        self, sublayers: Sequence[nn.Module], norm: nn.Module, moe: MoEStream, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.norm, self.moe, self.after = norm, moe, after or nn.Identity()
        self.schedule = Schedule("top_k", chunks=moe.num_chunks)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        for name, sublayer in zip(SUBLAYERS, self.sublayers, strict=False):
            x_BSD = self.operator(name, sublayer, x_BSD)
        routed_BSD, stats = self.moe(self.norm(x_BSD), mask_BS)
        return MoEOutput(x_BSD + self.after(routed_BSD), stats)


class SharedExpertBlock(Operators):
    """h + SE(h) + sum_i G(h)_i E_i(h) (Eq. 6): the shared expert can hide one of the two transfers.

    schedule slot 0: experts, then shared expert (beside combine); slot 1: shared expert (beside dispatch), then
    experts.
    """

    def __init__(
        self,
        sublayers: Sequence[nn.Module],
        norm: nn.Module,
        shared_expert: nn.Module,
        coefficient: nn.Module,
        moe: MoEStream,
        schedule: Schedule,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        assert schedule.position == "shared_expert"
        self.sublayers = nn.ModuleList(sublayers)
        self.norm, self.shared_expert, self.coefficient, self.moe = norm, shared_expert, coefficient, moe
        self.schedule, self.after = schedule, after or nn.Identity()

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> MoEOutput:
        for name, sublayer in zip(SUBLAYERS, self.sublayers, strict=False):
            x_BSD = self.operator(name, sublayer, x_BSD)
        u_BSD = self.norm(x_BSD)
        state = self.moe.begin(u_BSD, mask_BS)
        if self.schedule.slot == 0:
            state = self.moe.run_experts(state)
        shared_BSD = self.operator("shared_expert", self.shared_expert, u_BSD)
        if self.schedule.slot == 1:
            state = self.moe.run_experts(state)
        routed_BSD, stats = self.moe.finish(state)
        return MoEOutput(x_BSD + self.after(self.coefficient(u_BSD, shared_BSD, routed_BSD)), stats)
