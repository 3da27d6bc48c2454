"""The rows of reports: how any of them is written and read, and the row of `bench overlap`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Kind = Literal["forward", "train"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Figures = TypeVar("Figures")
# metadata of a field whose figures stand in a report beside those of its row
BESIDE_ITS_ROW = {"beside": True}


def to_json(value: Any) -> Any:
    """Return what a report has of a row, or of a part of one. What was not measured, None, is left
    out."""
    if isinstance(value, Mapping):
        return {name: to_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    if not is_dataclass(value):
        return value
    content: dict[str, Any] = {}
    for each in fields(value):
        figures = getattr(value, each.name)
        if figures is None:
            continue
        if each.metadata == BESIDE_ITS_ROW:
            content |= to_json(figures)
        else:
            content[each.name] = to_json(figures)
    return content


def from_json(kind: type[Figures], content: Mapping[str, Any]) -> Figures:
    """Return a row of a report, or a part of one. What the report lacks has its default, and what
    no field names is left out.

    kind: its dataclass.
    """
    assert is_dataclass(kind)
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for each in fields(kind):
        if each.metadata == BESIDE_ITS_ROW:
            part = part_of(types[each.name])
            if fields(part)[0].name in content:
                values[each.name] = from_json(part, content)
        elif each.name in content:
            values[each.name] = read(types[each.name], content[each.name])
    return kind(**values)


def read(kind: Any, value: Any) -> Any:
    """Return a value of JSON as its annotation says."""
    part = part_of(kind)
    if value is None:
        return None
    if is_dataclass(part):
        return from_json(cast(type[Any], part), value)
    if get_origin(part) is tuple:
        return tuple(read(get_args(part)[0], each) for each in value)
    if isinstance(value, Mapping) and get_args(part):
        return {name: read(get_args(part)[1], each) for name, each in value.items()}
    return value


def part_of(kind: Any) -> Any:
    """Return an annotation without its None."""
    return get_args(kind)[0] if get_origin(kind) in (Union, UnionType) else kind


@dataclass(frozen=True)
class LoadFigures:
    """What a load costs a row, beside the balanced one in the same rounds (uneven.py).

    dropped: share of the copies. max_over_mean_...: how uneven the routing is (loads.imbalance).
    """

    over_balanced_forward: float
    over_balanced_train: float
    over_balanced_quartiles: list[float]
    straggler_forward: float
    straggler_train: float
    max_over_mean_ranks: float
    max_over_mean_experts: float
    max_over_mean_tokens: float
    dropped: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of blocks at its best schedule: times are medians, speed-ups are over sequential top-2.

    auto: of the schedule that the planner has chosen. inside_gain: what experts inside attention
    gain; None: the window has no attention.
    auto_slots: of each block, where every block has an MoE. The gradients are those of an
    iteration; limit_train and of_limit are known on links with a rate. over_best_...: what the row
    gains over other models (row_figures.py). peak_mb: memory of a step beyond what is allocated
    before it. peak_over_one_batch: that of a row with two batches in flight over that with one.
    auto_of_both: what `schedule=auto` chooses between both.
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
    at_load: LoadFigures | None = field(default=None, metadata=BESIDE_ITS_ROW)

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


def rows_of(report: Mapping[str, Any]) -> dict[str, Row]:
    """Return the rows of a report of `bench overlap`."""
    return rows_as(Row, report)


def rows_as(kind: type[Figures], report: Mapping[str, Any]) -> dict[str, Figures]:
    """Return the rows of a report as a kind of figures."""
    return {name: from_json(kind, row) for name, row in report["rows"].items()}


def table_cells(rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """Return what a table shows of rows: their figures and the place of their experts."""
    return {name: {**to_json(row), "place": row.place} for name, row in rows.items()}


def with_quartiles(median: float, quartiles: Sequence[float]) -> str:
    """Return a speed-up as pages show it: 1.53 [1.46, 1.56]."""
    return f"{median:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]"
