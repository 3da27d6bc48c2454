"""The schedule as a value (section 3.2): which backbone operators an MoE stream can hide behind,
and where its experts run.

The *window* is the backbone computation between the tap and the end of the block. It holds the
sub-layers after the tap, then the shared expert where the architecture has one (section 3.1):

    scmoe, pos1      attention, shared_expert                      slots 0..2
    scmoe, pos2      mlp, attention, shared_expert                 slots 0..3
    scmoe, pos3      attention, mlp, attention, shared_expert      slots 0..4
    scmoe, carried   attention, shared_expert                      slots 0..2
    scmoe, first     shared_expert                                 slots 0..1
    farskip          attention, shared_expert                      slots 0..2
    dgmoe            as scmoe without the shared expert; its current half comes after the window
    shared_expert    shared_expert                                 slots 0..1
    top_k            nothing                                       slot 0

At slot k the experts run after k operators of the window. Where the next operator is attention,
they may also run inside it: between its core (norm, projections, softmax) and its output
projection. Megatron's ShortcutMoE, FarSkip and LongCat-Flash's serving cut their windows there.

With an MoE in every fourth block, the window lies in the last two of them and is that of a pair.
With an MoE in every block, the tap of Pos-2 lies in the preceding block, which hands it on
(`carried`). The first block has no preceding one and taps its own sub-layers' output (`first`).
"""

from dataclasses import dataclass
from functools import cached_property

# sub-layers of a pair, in order. With an MoE in every block a block has the first of them. With one
# in every fourth block, attention and MLP come twice more before the pair
SUBLAYERS = ("attention", "mlp", "attention")
POSITIONS = {"pos1": 1, "pos2": 2, "pos3": 3}  # sub-layers between the tap and the end of the block
BETWEEN_BLOCKS = {"carried": 1, "first": 0}  # the same for taps at Pos-2 with an MoE in every block
# of an attention that the experts run inside of
ATTENTION_PARTS = ("attention_core", "attention_out")
# by architecture, where its tap may be; none: it has no tap
POSITIONS_OF: dict[str, tuple[str, ...]] = {
    "top_k": (),
    "shared_expert": (),
    "scmoe": (*POSITIONS, *BETWEEN_BLOCKS),
    "dgmoe": tuple(POSITIONS),
    "farskip": (),
}


@dataclass(frozen=True)
class Schedule:
    """When the experts run, and in how many chunks.

    Results are bit-identical for every slot. Chunks change the rounding.

    position: where the tap is; None for the architectures without a shortcut. expert_slot: number
    of operators of the window that run before the experts; None: the middle of the window, or its
    last attention where they run inside one. chunks: pieces that the rows are cut into, so that one
    chunk's experts hide another's transfer. inside_attention: the experts run inside the attention
    after the slot, between its two ATTENTION_PARTS. Raises ValueError for a combination that does
    not exist.
    """

    architecture: str
    position: str | None = None
    expert_slot: int | None = None
    chunks: int = 1
    inside_attention: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in POSITIONS_OF:
            raise ValueError(
                f"architecture is {self.architecture!r}, allowed: {', '.join(POSITIONS_OF)}"
            )
        allowed = POSITIONS_OF[self.architecture] or (None,)
        if self.position not in allowed:
            names = ", ".join(map(str, allowed))
            raise ValueError(
                f"position is {self.position!r}, allowed for {self.architecture}: {names}"
            )
        if self.inside_attention and not self.attentions:
            raise ValueError(f"schedule.inside_attention is True, allowed for {self.name}: False")
        if self.expert_slot is None:
            slot = self.attentions[-1] if self.inside_attention else len(self.window) // 2
            object.__setattr__(self, "expert_slot", slot)
        if not 0 <= self.slot <= len(self.window):
            raise ValueError(
                f"schedule.slot is {self.slot}, allowed for {self.name}: 0..{len(self.window)}"
            )
        if self.inside_attention and self.slot not in self.attentions:
            slots = " | ".join(map(str, self.attentions))
            raise ValueError(
                f"schedule.slot is {self.slot}, allowed for {self.name} with"
                f" schedule.inside_attention: {slots}, as an attention follows"
            )
        if self.chunks < 1:
            raise ValueError(f"schedule.chunks is {self.chunks}, allowed: 1 or more")

    @property
    def name(self) -> str:
        """Architecture and position, for messages."""
        if self.position is None:
            return self.architecture
        return f"{self.architecture} {self.position}"

    @property
    def slot(self) -> int:
        assert self.expert_slot is not None
        return self.expert_slot

    @property
    def place(self) -> str:
        """The slot, for messages."""
        return f"slot {self.slot}{' inside attention' if self.inside_attention else ''}"

    @property
    def sublayers_after_tap(self) -> int:
        if self.position is None:
            return 1 if self.architecture == "farskip" else 0
        return (POSITIONS | BETWEEN_BLOCKS)[self.position]

    @cached_property
    def window(self) -> tuple[str, ...]:
        sublayers = SUBLAYERS[len(SUBLAYERS) - self.sublayers_after_tap :]
        has_shared_expert = self.architecture in ("shared_expert", "scmoe", "farskip")
        return (*sublayers, "shared_expert") if has_shared_expert else sublayers

    @cached_property
    def attentions(self) -> tuple[int, ...]:
        """The slots that an attention follows, inside of which experts can run."""
        return tuple(slot for slot, operator in enumerate(self.window) if operator == "attention")

    @property
    def after_window(self) -> tuple[str, ...]:
        """Computation after the last slot that can still hide combine: DGMoE's current half."""
        return ("current",) if self.architecture == "dgmoe" else ()

    @cached_property
    def around_experts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The operators of the window before the experts, and those after them."""
        before, after = self.window[: self.slot], self.window[self.slot :]
        if self.inside_attention:
            core, out = ATTENTION_PARTS
            return (*before, core), (out, *after[1:])
        return before, after

    def operators(self) -> tuple[str, ...]:
        """Return the names of all operators, from the tap to the end of the block.

        They are in the order in which a rank starts them.
        """
        begin = ("route", "encode") + ("dispatch",) * self.chunks
        experts = ("experts", "combine") * self.chunks
        before, after = self.around_experts
        return begin + before + experts + after + self.after_window + ("decode",)

    def backward_operators(self) -> tuple[str, ...]:
        """Return the same for backward, the mirror of forward.

        The gradients of combine travel first, those of dispatch last.

        A transfer is listed where it starts. The transfer of the rows' gradients starts right after
        decode's backward, because forward waits for the rows right before decode.
        """
        begin = ("decode",) + ("combine",) * self.chunks + self.after_window
        experts = ("experts", "dispatch") * self.chunks
        before, after = self.around_experts
        return begin + after[::-1] + experts + before[::-1] + ("encode", "route")


@dataclass(frozen=True)
class ModelSchedule:
    """How a model runs; models/run_as.py sets it.

    blocks: the schedule of each block with an MoE module, in the order of the model.
    batches_in_flight: 2: the halves of a rank's batch go through the blocks in turns. Raises
    ValueError for another number than 1 and 2.
    """

    blocks: tuple[Schedule, ...]
    batches_in_flight: int = 1

    def __post_init__(self) -> None:
        if self.batches_in_flight not in (1, 2):
            raise ValueError(f"batches_in_flight is {self.batches_in_flight}, allowed: 1 | 2")

    @property
    def in_one_batch(self) -> "ModelSchedule":
        """Return the same schedules of the blocks with one batch in flight."""
        return ModelSchedule(self.blocks)

    def in_batches_of(self, other: "ModelSchedule") -> "ModelSchedule":
        """Return the same schedules of the blocks with as many batches in flight as another."""
        return ModelSchedule(self.blocks, other.batches_in_flight)

    @property
    def is_measurable(self) -> bool:
        """Whether operators can be timed: those of two batches in flight overlap each other."""
        return self.batches_in_flight == 1

    @property
    def batches_in_words(self) -> str:
        """The batches in flight as the end of a label; nothing for one."""
        return ", two batches in flight" if self.batches_in_flight == 2 else ""
