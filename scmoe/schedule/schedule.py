"""The schedule as a value (section 3.2): which backbone operators an MoE stream can hide behind, and where its
experts run.

The *window* is the backbone computation between the tap and the end of the block, the shared expert last (section 3.1):

    pos1   attention, shared_expert                      slots 0..2
    pos2   mlp, attention, shared_expert                 slots 0..3
    pos3   attention, mlp, attention, shared_expert      slots 0..4

A shared-expert MoE has the window (shared_expert), slots 0..1; a standard top-k MoE has none, slot 0. DGMoE, which has
no shared expert, has ScMoE's windows without it; its current half comes after the window.
Slot k means: after k operators of the window the experts run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ShortcutPosition = Literal["pos1", "pos2", "pos3"]

SUBLAYERS = ("attention", "mlp", "attention")  # of a pair, in order; of a block with an MoE in every block: the first

WINDOWS: dict[str | None, tuple[str, ...]] = {
    "pos1": ("attention", "shared_expert"),
    "pos2": ("mlp", "attention", "shared_expert"),
    "pos3": ("attention", "mlp", "attention", "shared_expert"),
    "shared_expert": ("shared_expert",),
    "top_k": (),
    "dgmoe_pos1": ("attention",),
    "dgmoe_pos2": ("mlp", "attention"),
    "dgmoe_pos3": ("attention", "mlp", "attention"),
}


@dataclass(frozen=True)
class Schedule:
    """When the experts run, and in how many chunks. It changes when things run, never what comes out.

    position: a key of WINDOWS: a shortcut position, or the architecture of a block without a shortcut.
    expert_slot: backbone operators of the window that run before the experts; None: the middle of the window.
    chunks: pieces that the rows are cut into, so that one chunk's experts hide another's transfer.
    """

    position: str
    expert_slot: int | None = None
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.position not in WINDOWS:
            raise ValueError(f"schedule.position is {self.position!r}, allowed: {', '.join(map(str, WINDOWS))}")
        if self.expert_slot is None:
            object.__setattr__(self, "expert_slot", len(self.window) // 2)
        if not 0 <= self.slot <= len(self.window):
            raise ValueError(f"schedule.slot is {self.slot}, allowed for {self.position}: 0..{len(self.window)}")
        if self.chunks < 1:
            raise ValueError(f"schedule.chunks is {self.chunks}, allowed: 1 or more")

    @property
    def slot(self) -> int:
        assert self.expert_slot is not None
        return self.expert_slot

    @property
    def window(self) -> tuple[str, ...]:
        return WINDOWS[self.position]

    @property
    def after_window(self) -> tuple[str, ...]:
        """What else combine may hide behind, but no slot comes after: DGMoE's current half."""
        return ("current",) if self.position.startswith("dgmoe") else ()

    def operators(self) -> tuple[str, ...]:
        """Names of all operators in the order a rank starts them, from the tap to the end of the block."""
        experts: tuple[str, ...] = ()
        for _ in range(self.chunks):
            experts += ("experts", "combine")
        begin = ("route", "encode") + ("dispatch",) * self.chunks
        return begin + self.window[: self.slot] + experts + self.window[self.slot :] + self.after_window + ("decode",)

    def backward_operators(self) -> tuple[str, ...]:
        """The same of backward, its mirror: the gradients of combine travel first, those of dispatch second.

        A transfer stands where it is started: for the rows' gradients that is right after decode's backward, since
        the rows were awaited right before decode.
        """
        experts: tuple[str, ...] = ()
        for _ in range(self.chunks):
            experts += ("experts", "dispatch")
        begin = ("decode",) + ("combine",) * self.chunks + self.after_window
        return begin + self.window[self.slot :][::-1] + experts + self.window[: self.slot][::-1] + ("encode", "route")
