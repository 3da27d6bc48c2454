"""How a block with an MoE module is wired: one table of the published wirings.

A wiring is written in the words of a configuration's section moe. A training reads it from its
configuration, api.ScMoEBlock and the benches take a row by its name, and build.py builds the block.
docs/shortcuts.md says what each row computes, and configs/model/ has presets.

Nothing here imports torch, so a configuration is checked without it.
"""

from dataclasses import dataclass, fields

from scmoe.schedule.schedule import POSITIONS_OF


@dataclass(frozen=True)
class Wiring:
    """Which parts a block has, and what its experts read.

    every: an MoE in every block (1), in every second one (2, a pair) or in every fourth one (4).
    position: of the tap. first_position: of the tap in the first block with an MoE, where it
    differs. tap_norm: own | shared, with the sub-layer after the tap. combine, coefficient_input:
    how shared and routed output are added, and what the gate of their weights reads. after_norm:
    their sum has a norm. distinct_experts: of DGMoE's two gates. A field that an architecture does
    not use has its default.
    """

    architecture: str = "scmoe"
    every: int = 2
    position: str = "pos2"
    first_position: str | None = None
    tap_norm: str = "own"
    combine: str = "cg1"
    coefficient_input: str = "current"
    after_norm: bool = False
    distinct_experts: bool = True

    @property
    def taps(self) -> tuple[str | None, str | None]:
        """Where the tap is in the first block with an MoE, and in the others, as
        Schedule.position."""
        if not POSITIONS_OF.get(self.architecture):
            return None, None
        if self.every == 1 and self.position == "pos2":
            return "first", "carried"  # it lies in the preceding block, which the first one lacks
        return self.first_position or self.position, self.position

    @property
    def has_gate(self) -> bool:
        """Whether a coefficient gate adds shared and routed output."""
        return self.architecture in ("shared_expert", "scmoe")

    @property
    def overrides(self) -> list[str]:
        """What a configuration says of it, without defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return [
            f"moe.{key}={str(value).lower()}"
            for key, (value, default) in values.items()
            if value != default
        ]


WIRINGS = {
    "top_k": Wiring("top_k"),
    "shared_expert": Wiring("shared_expert"),
    "scmoe": Wiring("scmoe"),
    "longcat": Wiring("scmoe", tap_norm="shared", combine="direct_add"),
    "nvidia": Wiring("scmoe", every=1, position="pos1", combine="direct_add", after_norm=True),
    "nous": Wiring("scmoe", every=1, combine="direct_add"),
    "farskip": Wiring("farskip", every=1),
    "dgmoe": Wiring("dgmoe"),
}
