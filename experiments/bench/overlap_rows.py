"""The rows of a report of `bench overlap`, as they are computed and as JSON has them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["forward", "train"]


@dataclass(frozen=True)
class LoadFigures:
    """What a load costs a row, beside the balanced one in the same rounds (uneven.py).

    balanced: figures of the row at the balanced load. dropped: share of the copies. The last three
    say how uneven the routing is (loads.imbalance).
    """

    over_balanced_forward: float
    over_balanced_train: float
    over_balanced_quartiles: list[float]
    straggler_forward: float
    straggler_train: float
    dropped: float | None
    balanced: dict[str, Any]
    max_over_mean_ranks: float
    max_over_mean_experts: float
    max_over_mean_tokens: float


@dataclass(frozen=True)
class OverlapRow:
    """A row at its best schedule: times are medians, speed-ups are over sequential top-2.

    auto: of the schedule that the planner has chosen. inside_gain: what experts inside attention
    gain; None: the window has no attention. measured_over_model: None where there is no model.
    auto_slots: of each block, where every block has an MoE. The gradients are those of an
    iteration; limit_train and of_limit are known on links with a rate. over_best_...: what the row
    gains over other models (over_best.py). peak_mb: memory of a step beyond what is allocated
    before it. peak_over_one_batch: that of a row with two batches in flight over that with one.
    auto_of_both: what `schedule=auto` chooses between both (auto.py).
    at_load: None at the balanced load.
    """

    forward_ms: float
    train_ms: float
    forward_speedup: float
    train_speedup: float
    forward_quartiles: list[float]
    train_quartiles: list[float]
    overlap_forward: float
    overlap_backward: float
    slot: int
    chunks: int
    auto_slot: int
    auto_chunks: int
    auto_over_best: float
    measured_over_model: float | None
    peak_mb: float
    links: str
    compute: str
    inside_attention: bool = False
    auto_inside_attention: bool = False
    inside_gain: dict[str, Any] | None = None
    auto_slots: list[str] | None = None
    gradient_mb: float | None = None
    rows_over_gradients: float | None = None
    limit_train: float | None = None
    of_limit: float | None = None
    batches_in_flight: int = 1
    peak_over_one_batch: float | None = None
    auto_of_both: dict[str, Any] | None = None
    over_best_without_another_model: dict[str, Any] | None = None
    over_best_without_shortcut: dict[str, Any] | None = None
    at_load: LoadFigures | None = None

    @property
    def place(self) -> str:
        """Return where the experts run: the slot, and whether they are inside the attention."""
        return f"{self.slot} inside" if self.inside_attention else str(self.slot)

    def speedup(self, kind: Kind) -> float:
        """Return the speed-up over sequential top-2 of a forward pass or of a training step."""
        return self.forward_speedup if kind == "forward" else self.train_speedup

    def quartiles(self, kind: Kind) -> list[float]:
        """Return the quartiles of `speedup`."""
        return self.forward_quartiles if kind == "forward" else self.train_quartiles

    def to_json(self) -> dict[str, Any]:
        """Return what a report has of the row. Figures that it does not have are left out."""
        content = asdict(self)
        at_load = content.pop("at_load") or {}
        for name in SOMETIMES:
            if content[name] is None:
                del content[name]
        return content | at_load

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "OverlapRow":
        """Return the row of a report; older reports lack what is inside attention."""
        own_names = {field.name for field in fields(cls)}
        figures = {name: value for name, value in content.items() if name in own_names}
        if "over_balanced_train" in content:
            names = [field.name for field in fields(LoadFigures)]
            figures["at_load"] = LoadFigures(**{name: content[name] for name in names})
        return cls(**figures)


SOMETIMES = (
    "peak_over_one_batch",
    "auto_of_both",
    "auto_slots",
    "gradient_mb",
    "rows_over_gradients",
    "limit_train",
    "of_limit",
    "over_best_without_another_model",
    "over_best_without_shortcut",
)


def rows_of(report: Mapping[str, Any]) -> dict[str, OverlapRow]:
    """Return the rows of a report that was read from JSON."""
    return {name: OverlapRow.from_json(row) for name, row in report["rows"].items()}


def cells_of(rows: Mapping[str, OverlapRow]) -> dict[str, dict[str, Any]]:
    """Return what a table shows of rows: their figures and the place of their experts."""
    return {name: {**row.to_json(), "place": row.place} for name, row in rows.items()}
