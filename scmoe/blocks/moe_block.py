"""What every block with an MoE module shares: its parts, its schedule, and how it is set to run.

    sub-layers before the tap -> begin -> sub-layers after it, experts at their slot -> finish

Each architecture's forward fills this line with its own terms: standard.py, shortcut.py,
double_gate.py, farskip.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache, with_cache
from scmoe.blocks.sublayers import is_parted
from scmoe.moe.dispatcher import Dispatcher
from scmoe.moe.operators import AnyRecorder, Operators
from scmoe.moe.stream import MoEStream, StreamState
from scmoe.schedule.schedule import ATTENTION_PARTS, SUBLAYERS, Schedule


class MoEBlock(Operators):
    """The base of all architectures.

    A block is called as block(x_BSD, mask_BS) and returns an MoEOutput. With a KVCache as a third
    argument its attention modules also read earlier tokens' keys and values. A block that returns
    HandedOn leaves an activation for the next block, which gets it as `carry`
    (models/residual_stream.py).

    sublayers: of one block (attention), of a pair (attention, MLP, attention) or of four blocks;
    each is called as sublayer(x_BSD), and as sublayer(x_BSD, cache) in generation. norm: reads the
    output of the last sub-layer; in FarSkip, the block's input. after: the MoE module's output
    passes through it before it is added: a norm, dropout; in SwinV2, norm and drop path. tap_norm:
    reads the tap, where the architecture has one. shared_expert, coefficient: where it has a shared
    expert. coefficient_reads_tap: the coefficient gate reads the (normed) tap instead of the shared
    expert's input. distinct_experts: DGMoE's two gates choose two experts for each token. Raises
    ValueError for a position that requires more sub-layers than there are, and where `check` does.
    """

    architecture: str

    def __init__(
        self,
        sublayers: Sequence[nn.Module],
        norm: nn.Module,
        moe: MoEStream,
        schedule: Schedule,
        after: nn.Module | None = None,
        *,
        tap_norm: nn.Module | None = None,
        shared_expert: nn.Module | None = None,
        coefficient: nn.Module | None = None,
        coefficient_reads_tap: bool = False,
        distinct_experts: bool = True,
    ) -> None:
        super().__init__()
        assert schedule.architecture == self.architecture
        after_tap = schedule.sublayers_after_tap
        if len(sublayers) < after_tap:
            raise ValueError(
                f"{schedule.name} requires {after_tap} or more sub-layers, and the block has"
                f" {len(sublayers)}. Choose a position nearer to the end of the block."
            )
        self.sublayers = nn.ModuleList(sublayers)
        self.tap_norm = tap_norm
        self.norm = norm
        self.shared_expert = shared_expert
        self.coefficient = coefficient
        self.moe = moe
        self.after = after or nn.Identity()
        self.schedule = schedule
        self.coefficient_reads_tap = coefficient_reads_tap
        self.distinct_experts = distinct_experts
        # index of the sub-layer after the tap; without a tap, their number
        self.tap = len(sublayers) - after_tap
        self.check_parts()
        self.check(schedule)

    def check_parts(self) -> None:
        """Raise where the parts are not those of the architecture."""
        raise NotImplementedError

    def run_as(
        self, schedule: Schedule, dispatcher: Dispatcher, recorder: AnyRecorder | None = None
    ) -> None:
        """Set how the block runs: slot and chunks, how rows travel, and what notes the operators'
        times."""
        assert schedule.name == self.schedule.name, "a block keeps its architecture and its tap"
        self.check(schedule)
        self.schedule, self.recorder = schedule, recorder
        self.moe.dispatcher, self.moe.recorder = dispatcher, recorder

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError if experts shall run inside an attention that has no two parts."""
        if not schedule.inside_attention:
            return
        attention = self.after_tap()[schedule.slot]
        if not is_parted(attention):
            name = type(getattr(attention, "f", attention)).__name__
            raise ValueError(
                f"schedule.inside_attention is True, allowed for attention by {name}: False"
            )

    @property
    def divided(self) -> Schedule:
        """The schedule at the slot where all its operators can be timed.

        This is inside the window's first attention, if every attention there has two parts. Else
        it is the schedule as it is.
        """
        slots, sublayers = self.schedule.attentions, self.after_tap()
        if not slots or not all(is_parted(sublayers[slot]) for slot in slots):
            return self.schedule
        return replace(self.schedule, expert_slot=slots[0], inside_attention=True)

    def before_tap(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Run the sub-layers before the tap."""
        before = list(self.sublayers)[: self.tap]
        for name, sublayer in zip(cycle(SUBLAYERS[:2]), before, strict=False):
            x_BSD = self.operator(name, sublayer, *with_cache(x_BSD, cache=cache))
        return x_BSD

    def through_window(
        self,
        x_BSD: Tensor,
        state: StreamState,
        cache: KVCache | None = None,
        onto: Tensor | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Run the sub-layers after the tap, and the experts if their slot is before or inside one.

        onto: as Residual's, where there is one sub-layer.
        """
        for slot, sublayer in enumerate(self.after_tap()):
            if slot == self.schedule.slot and self.schedule.inside_attention:
                x_BSD, state = self.around_experts(sublayer, x_BSD, state, cache, onto)
                continue
            if slot == self.schedule.slot:
                state = self.moe.run_experts(state)
            f: Any = sublayer if onto is None else partial(sublayer, onto=onto)
            name = self.schedule.window[slot]
            x_BSD = self.operator(name, f, *with_cache(x_BSD, cache=cache))
        return x_BSD, state

    def through_shared_expert(
        self, u_BSD: Tensor, state: StreamState
    ) -> tuple[Tensor, StreamState]:
        """Run the shared expert, which ends the window, and the experts if their slot is right
        before or after it."""
        assert self.shared_expert is not None
        last = len(self.schedule.window)
        if self.schedule.slot == last - 1:
            state = self.moe.run_experts(state)
        shared_BSD = self.operator("shared_expert", self.shared_expert, u_BSD)
        if self.schedule.slot == last:
            state = self.moe.run_experts(state)
        return shared_BSD, state

    def around_experts(
        self,
        attention: Any,
        x_BSD: Tensor,
        state: StreamState,
        cache: KVCache | None = None,
        onto: Tensor | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Run an attention sub-layer in two parts, and the experts between them.

        onto: as Residual's.
        """
        core, out = ATTENTION_PARTS
        core_BSv = self.operator(core, attention.core, *with_cache(x_BSD, cache=cache))
        state = self.moe.run_experts(state)

        def project(core_BSv: Tensor) -> Tensor:
            return attention(x_BSD, onto=onto, core=core_BSv)

        return self.operator(out, project, core_BSv), state

    def after_tap(self) -> list[nn.Module]:
        """Return the sub-layers of the window, in order: sub-layer i runs right after slot i."""
        return list(self.sublayers)[self.tap :]


def moe_blocks_of(model: nn.Module) -> list[MoEBlock]:
    """Return all MoE blocks of a model, in their order."""
    return [module for module in model.modules() if isinstance(module, MoEBlock)]
